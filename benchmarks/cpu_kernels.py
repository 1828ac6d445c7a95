"""Which form of a linear layer and of attention is faster here: ratios, interleaved, medians.

python benchmarks/cpu_kernels.py
"""

import json
import platform
import statistics
import time

import torch
import torch.nn.functional as F

from mor.engine.attention import decode_attention
from mor.engine.weights import FewRowsLinear

ROUNDS = 9
THREADS = 2


def medians(variants):
    """Median seconds of each variant, forward and backward, run in turn."""
    times = {name: [] for name in variants}
    for round_ in range(ROUNDS + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run().sum().backward()
            if round_:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(t) for name, t in times.items()}


def linear(tokens, width, outputs):
    x = torch.randn(tokens, width, requires_grad=True)
    w = torch.randn(outputs, width, requires_grad=True)
    return medians({"F.linear": lambda: F.linear(x, w), "(W @ x.T).T": lambda: (w @ x.T).T})


def few_rows(tokens):
    """Forward only, as in decoding: the products of 30 layers of the 135M shape, so that no weight
    is in the cache."""
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    layers = [FewRowsLinear(torch.randn(o, i)) for _ in range(30) for o, i in shapes]
    x = {width: torch.randn(tokens, width) for width in (576, 1536)}
    variants = {
        "F.linear": lambda layer, x: F.linear(x, layer.weight),
        "(W @ x.T).T": lambda layer, x: torch.mm(layer.weight, x.t()).t(),
        "FewRowsLinear": lambda layer, x: layer(x),
    }
    times = {name: [] for name in variants}
    with torch.inference_mode():
        for round_ in range(ROUNDS + 1):
            for name, run in variants.items():
                started = time.perf_counter()
                for layer in layers:
                    run(layer, x[layer.weight.shape[1]])
                if round_:
                    times[name].append(time.perf_counter() - started)
    return {name: statistics.median(t) for name, t in times.items()}


def grouped_attention():
    q = torch.randn(8, 6, 256, 64, requires_grad=True)
    k, v = (torch.randn(8, 2, 256, 64, requires_grad=True) for _ in range(2))

    def repeated():
        return F.scaled_dot_product_attention(
            q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), is_causal=True
        )

    return medians(
        {
            "enable_gqa": lambda: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ),
            "repeated heads": repeated,
        }
    )


def paged_attention(tokens, entries):
    """Forward only, in the 135M shape: one query of each sequence, which has between half and all
    of the entries."""
    k, v = (torch.randn(tokens * entries, 3, 64) for _ in range(2))
    table = torch.randperm(tokens * entries, dtype=torch.int32).view(tokens, entries)
    q, rows = torch.randn(tokens, 9, 64), torch.arange(tokens, dtype=torch.int32)
    seen = torch.linspace(entries // 2, entries, tokens).int()
    backends = {
        name: decode_attention(name, q.device, q.dtype) for name in ("gathered", "compiled")
    }
    times = {name: [] for name in backends}
    with torch.inference_mode():
        for round_ in range(2 * ROUNDS + 1):
            for name, attend in backends.items():
                started = time.perf_counter()
                attend(q, k, v, table, rows, seen, longest=entries)
                if round_:
                    times[name].append(time.perf_counter() - started)
    return {name: statistics.median(t) for name, t in times.items()}


def main():
    torch.set_num_threads(THREADS)
    cases = {
        f"linear {m}x{d}->{o}": linear(m, d, o)
        for m, d, o in [(512, 64, 176), (2048, 192, 512), (4096, 576, 1536)]
    }
    cases |= {f"decoding, {m} rows": few_rows(m) for m in (1, 2, 8, 15, 16, 31, 32, 64)}
    cases["attention 8x256, 6/2 heads"] = grouped_attention()
    for entries in (64, 512):
        cases[f"paged attention 32x{entries}"] = paged_attention(32, entries)
    rows = []
    for case, found in cases.items():
        (first, a), *others = found.items()
        for other, b in others:
            rows.append(
                {
                    "case": case,
                    "first": first,
                    "second": other,
                    "first_s": a,
                    "second_over_first": b / a,
                }
            )
            print(f"{case:32} {first} {a * 1e3:.2f} ms, {other} / {first} = {b / a:.2f}")
    machine = {"threads": THREADS, "torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"rows": rows, "machine": machine}))


if __name__ == "__main__":
    main()
