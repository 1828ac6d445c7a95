"""Two processes train as one does with the same global batch: DDP and FSDP2, every router, any number on resuming."""

import dataclasses
import io
import json
import os
import random
import socket
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from mor import checkpoint
from mor.config import RouterConfig, preset
from mor.data import DataConfig
from mor.optim import OptimConfig
from mor.train import TrainConfig, load_config, train

ROUTERS = {
    "fixed": RouterConfig(),
    "expert": RouterConfig(kind="expert_choice", z_loss_weight=0.01, selection_weight=0.1),
    "token": RouterConfig(kind="token_choice"),
    "token-free": RouterConfig(kind="token_choice", balancing="loss_free", bias_update_rate=0.01),
    "random": RouterConfig(kind="random"),
}

RANK = """
import io, json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from mor.train import load_config, train

class Communication(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = {}
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("c10d"):
            name = str(function).split(".")[1]
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))

for run in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(run["port"])
    with Communication() as seen:
        train(load_config(Path(run["config"])), resume=run["resume"], console=Console(file=io.StringIO()))
    if os.environ["RANK"] == "0":
        Path(run["config"]).with_suffix(".counts").write_text(json.dumps(seen.counts))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    rows = [{"text": f"The square of {i} is {i * i}. " * 6} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path), tokenizer="bytes")


def settings(data, out, router, **overrides):
    recursions = 3
    values = dict(
        model=preset("tiny", num_recursions=recursions, router=router, num_layers=5, max_seq_len=64),
        data=data,
        out=str(out),
        steps=20,
        batch_size=2,
        seq_len=32,
        eval_every=10,
        eval_windows=4,
        log_every=1,
        optim=OptimConfig(lr=1e-3),
        device="cpu",
    )
    return TrainConfig(**(values | overrides))


def on_two_ranks(folder, configs, resume=False):
    """Train each config in two processes, one after the other."""
    runs = []
    for config in configs:
        file = folder / f"{config.out.replace('/', '_')}.json"
        file.write_text(json.dumps(dataclasses.asdict(config)))
        runs.append({"config": str(file), "resume": resume, "port": free_port()})
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        command = [sys.executable, "-c", RANK, json.dumps(runs)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / run["config"]).with_suffix(".counts").read_text()) for run in runs]


def free_port():
    """Below the range from which the system gives ports to others between now and the run."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port


def alone(config, **settings):
    return train(config, console=Console(file=io.StringIO()), **settings)


def curve(out, *names):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[row[n] for n in names] for row in rows if all(n in row for n in names)]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(how, data, tmp_path):
    configs = {name: settings(data, tmp_path / f"two-{name}", router, parallel=how) for name, router in ROUTERS.items()}
    on_two_ranks(tmp_path, configs.values())
    for name, router in ROUTERS.items():
        result = alone(settings(data, tmp_path / f"one-{name}", router, batch_size=4))
        for what in (["loss"], ["validation_nll"], ["grad_norm"], ["share_per_recursion"], ["tokens", "flops"]):
            ours, theirs = (torch.tensor(curve(tmp_path / f"{n}-{name}", *what)).double() for n in ("two", "one"))
            torch.testing.assert_close(
                ours, theirs, atol=1e-5, rtol=1e-5, msg=lambda m, n=name, w=what: f"{n} {w}: {m}"
            )
        for extra in {"expert": ["agreement", "selection", "z_loss"], "token": ["max_violation", "balancing"]}.get(
            name, []
        ):
            ours, theirs = (torch.tensor(curve(tmp_path / f"{n}-{name}", extra)) for n in ("two", "one"))
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda m, e=extra: f"{e}: {m}")
        loaded = checkpoint.load(tmp_path / f"two-{name}").model
        for (key, a), b in zip(loaded.state_dict().items(), result.state.model.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-3, msg=lambda m, n=name, k=key: f"{n} {k}: {m}")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_accumulation_reduces_once_per_step_and_fsdp_gathers_twice(how, data, tmp_path):
    """The recursions are one unit: gathered once, not once per recursion; the rest of the model is the other."""
    common = dict(steps=3, eval_every=100, eval_windows=1, parallel=how)
    many, few = (
        settings(data, tmp_path / name, ROUTERS["expert"], accumulate=k, **common) for name, k in [("a", 4), ("b", 1)]
    )
    counts = on_two_ranks(tmp_path, [many, few])
    reduced = "_reduce_scatter_base_" if how == "fsdp" else "allreduce_"
    if how == "fsdp":
        assert counts[1][reduced] == 3 * 2, "two units, once per step"
        assert counts[0][reduced] == counts[1][reduced], "nothing is reduced before the last forward of a step"
        gathered = [c["_allgather_base_"] for c in counts]
        assert gathered[1] == 3 * 2 + 2, "two units per training step and in the evaluation at the end"
        assert gathered[0] == gathered[1], "once per step, however many forwards it has"
    one = alone(settings(data, tmp_path / "one", ROUTERS["expert"], accumulate=8, **(common | {"parallel": "ddp"})))
    assert one.state.tokens == 3 * 8 * 2 * 32
    ours, theirs = (torch.tensor(curve(tmp_path / n, "tokens", "loss")).double() for n in ("a", "one"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_ranks(how, data, tmp_path):
    whole = settings(data, tmp_path / "whole", ROUTERS["expert"], batch_size=4, save_every=10, keep=0)
    alone(whole)
    expected = curve(tmp_path / "whole", "step", "loss")

    shrinking = settings(data, tmp_path / "shrinking", ROUTERS["expert"], parallel=how, save_every=10, keep=0)
    on_two_ranks(tmp_path, [shrinking])
    checkpoint.remove(tmp_path / "shrinking" / "checkpoints" / "step-00000020")
    saved = load_config(tmp_path / "shrinking" / "train.json")
    alone(dataclasses.replace(saved, batch_size=4), resume=True)
    assert torch.tensor(curve(tmp_path / "shrinking", "step", "loss")) == pytest.approx(
        torch.tensor(expected), abs=1e-5
    )

    checkpoint.remove(tmp_path / "whole" / "checkpoints" / "step-00000020")
    growing = load_config(tmp_path / "whole" / "train.json")
    on_two_ranks(tmp_path, [dataclasses.replace(growing, batch_size=2, parallel=how)], resume=True)
    assert torch.tensor(curve(tmp_path / "whole", "step", "loss")) == pytest.approx(torch.tensor(expected), abs=1e-5)


def test_muon_learns_and_refuses_shards(data, tmp_path):
    muon = OptimConfig(name="muon", lr=3e-3)
    result = alone(settings(data, tmp_path / "a", ROUTERS["expert"], optim=muon, batch_size=4))
    losses = [row[0] for row in curve(tmp_path / "a", "loss")]
    assert losses[-1] < 0.8 * losses[0]
    adamw, matrices = result.state.optimizers
    assert type(matrices).__name__ == "Muon" and all(p.ndim == 2 for g in matrices.param_groups for p in g["params"])
    held = [p for o in (adamw, matrices) for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(result.state.model.parameters()))
    checkpoint.remove(result.path)
    again = alone(settings(data, tmp_path / "a", ROUTERS["expert"], optim=muon, batch_size=4), resume=True)
    for a, b in zip(again.state.model.parameters(), result.state.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="needs whole matrices"):
        settings(data, tmp_path / "b", ROUTERS["expert"], optim=muon, parallel="fsdp")
