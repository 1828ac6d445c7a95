"""Time and peak memory of head and cross-entropy, forward and backward: in chunks, all logits at
once, torch's own.

python benchmarks/head_loss.py                      # 2048 tokens, d 576, vocabulary 49,152, one
thread
"""

import json
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from train_speed import allocated_peak

from mor.model.loss import linear_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Settings:
    tokens: int = 2048
    dim: int = 576
    vocab: int = 49_152
    rounds: int = 5
    threads: int = 1


def whole(x, weight, target):
    return F.cross_entropy(F.linear(x, weight), target)


def main():
    options = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.randn(options.tokens, options.dim, requires_grad=True)
    weight = (0.02 * torch.randn(options.vocab, options.dim)).requires_grad_()
    target = torch.randint(options.vocab, (options.tokens,))
    losses = {"chunked": linear_cross_entropy, "all logits": whole}
    if hasattr(F, "linear_cross_entropy"):  # PyTorch 2.13
        losses["torch"] = F.linear_cross_entropy

    def step(loss):
        started = time.perf_counter()
        loss(x, weight, target).backward()
        elapsed_s = time.perf_counter() - started
        x.grad = weight.grad = None
        return elapsed_s

    seconds = {name: [] for name in losses}
    for round_ in range(options.rounds + 1):
        for name, loss in losses.items():
            elapsed_s = step(loss)
            if round_:  # the first warms up
                seconds[name].append(elapsed_s)
    rows = []
    for name, loss in losses.items():
        peak, median = (
            allocated_peak(lambda loss=loss: step(loss)),
            statistics.median(seconds[name]),
        )
        rows.append(dict(loss=name, seconds=median, peak_mb=peak / 1e6))
        print(f"{name:10} {median:7.3f} s {peak / 1e6:8.1f} MB")
    print(json.dumps(dict(rows=rows, torch=torch.__version__)))


if __name__ == "__main__":
    main()
