"""What int8 weights cost in NLL and gain in speed when serving on a CPU.

    python benchmarks/int8.py CHECKPOINT TEXT  # text: a file, folder or prepared data

NLL by a causal evaluation of both; tokens per second of the engine with 1, 8 and 32 requests, both
taking turns. The last line is JSON.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import tyro

from mor import checkpoint
from mor.data.corpus import load_tokens
from mor.engine.bench import Lengths, load_for, take_turns
from mor.engine.weights import for_decoding


@dataclass(frozen=True, kw_only=True)
class Settings:
    checkpoint: tyro.conf.Positional[Path]
    text: tyro.conf.Positional[Path]
    windows: int = 16
    seq_len: int = 512
    batches: tuple[int, ...] = (1, 8, 32)
    rounds: int = 5
    seconds: float = 1.5
    threads: int = 2


@torch.inference_mode()
def nll(model, data, settings):
    """Nats per token over windows spread evenly, causal. From logits, since an int8 head has no
    float weight for the fused loss."""
    total, chosen = 0.0, data.spread(settings.seq_len, settings.windows)
    for i in chosen:
        batch = data.batch([i], settings.seq_len)
        total += F.cross_entropy(model(batch.tokens_BT).logits_BTV[0], batch.targets_BT[0]).item()
    return total / len(chosen)


def main():
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    _, model, tokenizer = checkpoint.load(settings.checkpoint)
    data = load_tokens(settings.text, tokenizer)
    found = {"nll": {}, "tokens_per_s": []}
    for name, quantize in (("float32", None), ("int8", "int8")):
        found["nll"][name] = nll(for_decoding(model.eval(), quantize), data, settings)
        print(f"{name}: {found['nll'][name]:.4f} nats", flush=True)
    for batch in settings.batches:
        common = dict(batch=batch, slots=batch, lengths=Lengths(mean=48, deviation=12))
        loads = [
            load_for("float32", model, **common),
            load_for("int8", model, quantize="int8", **common),
        ]
        take_turns(loads, rounds=settings.rounds, seconds=settings.seconds)
        speeds = {load.name: median(load.tokens_per_s) for load in loads}
        row = dict(batch=batch, **speeds, speedup=speeds["int8"] / speeds["float32"])
        found["tokens_per_s"].append(row)
        print({k: round(v, 2) for k, v in row.items()}, flush=True)
    print(json.dumps(found | dict(threads=settings.threads, torch=torch.__version__)))


if __name__ == "__main__":
    main()
