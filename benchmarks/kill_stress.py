"""Kill a training run with SIGKILL again and again, resume it, and compare its end with an
undisturbed run.

    python benchmarks/kill_stress.py --kills 20

A checkpoint is written after every step, so that many kills fall into the writing of one.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mor import checkpoint
from mor.run_folder import RunFolder
from mor.training.optim import OptimConfig, build_optimizers
from mor.training.sharded_state import load_optimizers

SETTINGS = """
steps = {steps}
batch_size = 4
seq_len = 64
save_every = 1
eval_every = 20
eval_windows = 4
log_every = 1
[data]
path = "{data}"
tokenizer = "bytes"
[model]
vocab_size = 257
dim = 64
num_heads = 4
num_kv_heads = 2
head_dim = 16
ffn_dim = 176
max_seq_len = 64
prelude_layers = 1
shared_layers = 1
coda_layers = 1
num_recursions = 3
[model.router]
kind = "expert_choice"
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-stress-"))
    data = folder / "data.jsonl"
    data.write_text(
        "".join(
            json.dumps({"text": f"The square of {i} is {i * i}. " * 6}) + "\n" for i in range(200)
        )
    )
    (folder / "run.toml").write_text(SETTINGS.format(steps=options.steps, data=data))

    whole = folder / "whole"
    subprocess.run(
        command("--config", folder / "run.toml", "--out", whole), check=True, capture_output=True
    )
    found = disturb(folder, options.kills, random.Random(options.seed))
    same = identical(whole, folder / "killed")
    print(
        f"{found['kills']} kills, {found['in_checkpoint']} of them while a checkpoint was being "
        "written"
    )
    print(f"final weights and optimizer state equal to the undisturbed run bit for bit: {same}")
    print(json.dumps({**found, "steps": options.steps, "identical": same}))
    shutil.rmtree(folder)
    if not same or found["kills"] < options.kills:
        raise SystemExit(1)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mor", "train", *map(str, arguments)]


def disturb(folder: Path, kills: int, draw: random.Random) -> dict[str, int]:
    """Run to the end with ``kills`` interruptions."""
    out, done, in_checkpoint = folder / "killed", 0, 0
    start = command("--config", folder / "run.toml", "--out", out)
    while True:
        process = subprocess.Popen(
            start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if done < kills:
            wait_for_progress(process, out)
            time.sleep(draw.uniform(0, 0.25))
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == 0:
            return {"kills": done, "in_checkpoint": in_checkpoint}
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"the run failed by itself:\n{errors}")
        done += 1
        in_checkpoint += bool(list(RunFolder(out).checkpoint(0).parent.glob(".*.tmp")))
        start = command("--resume", "--out", out)


def wait_for_progress(process: subprocess.Popen, out: Path) -> None:
    """Until the process has written a checkpoint of its own, or ended."""
    before = newest(out)
    while process.poll() is None and newest(out) <= before:
        time.sleep(0.001)


def newest(out: Path) -> str:
    return max((path.name for path in RunFolder(out).checkpoints()), default="")


def identical(a: Path, b: Path) -> bool:
    tensors, counters = zip(*map(everything, (a, b)), strict=True)
    return (
        tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
        and all(counters[0][k] == counters[1][k] for k in ("step", "position", "tokens", "flops"))
    )


def everything(run: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and moments by name, and the counters of a run's newest checkpoint."""
    _, model, _ = checkpoint.load(run)
    optimizers = build_optimizers(model, OptimConfig())
    load_optimizers(checkpoint.resolve(run), model, optimizers)
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[p]} {k}": v for p, state in optimizers[0].state.items() for k, v in state.items()
    }
    return model.state_dict() | moments, checkpoint.load_progress(run)


if __name__ == "__main__":
    main()
