"""Two processes train as one does with the same global batch: DDP and FSDP2, every router, any
number on resuming."""

import contextlib
import dataclasses
import io
import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from torch.distributed import HashStore, TCPStore

from mor import checkpoint
from mor.data.config import DataConfig
from mor.device import autocast
from mor.files import remove_folder
from mor.model.config import RouterConfig, preset
from mor.run_folder import RunFolder
from mor.training.config import TrainConfig, load_config
from mor.training.distributed import ALONE, Ranks, ranks, reducing, shard
from mor.training.loop import train
from mor.training.optim import OptimConfig
from mor.training.step import compute_loss
from tests.conftest import random_tokens, tiny
from tests.waits import Waits

ROUTERS = {
    "fixed": RouterConfig(),
    "expert": RouterConfig(kind="expert_choice", z_loss_weight=0.01, selection_weight=0.1),
    "token": RouterConfig(kind="token_choice"),
    "token-free": RouterConfig(kind="token_choice", balancing="loss_free", bias_update_rate=0.01),
    "random": RouterConfig(kind="random"),
    "elastic": RouterConfig(
        kind="expert_choice", causal_selection="gain", gate="residual", alpha=1.0
    ),
}
BESIDE = {"elastic": dict(full_depth_share=0.5, exit_share=1.0, exit_weight=0.3)}


# One of two processes: trains what each line of stdin says, answers each run with its collective
# operations.
RANK = """
import faulthandler, io, json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
faulthandler.register(signal.SIGUSR1)
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from mor.training.loop import train
from mor.training.config import load_config

class Communication(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = {}
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("c10d"):
            name = str(function).split(".")[1]
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))

for line in sys.stdin:
    run = json.loads(line)
    os.environ["MASTER_PORT"] = str(run["port"])
    with Communication() as seen:
        config, quiet = load_config(Path(run["config"])), Console(file=io.StringIO())
        done = train(config, resume=run["resume"], console=quiet)
    assert done.state.forward is done.state.model, "DDP outlives its process group"
    print(json.dumps(seen.counts), flush=True)
"""


class Pair:
    """Two processes that train together, run after run; a run that fails or hangs fails with what
    both said."""

    TIMEOUT_S = (
        300  # on a busy machine two processes in lock-step wait for each other most of the time
    )

    def __init__(self, folder):
        self.folder, self.processes, self.runs = folder, [], 0

    def __call__(self, config, resume=False):
        """Train; the counts of collective operations of the first rank."""
        if not self.processes:
            self.start()
        self.runs += 1
        file = self.folder / f"run-{self.runs}.json"
        file.write_text(json.dumps(dataclasses.asdict(config)))
        # The store of a run lives here, on a port of the system's choice: nobody else can have
        # taken it meanwhile.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        order = json.dumps({"config": str(file), "resume": resume, "port": store.port})
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):  # it died: the lack of an answer says so
                process.stdin.write(order + "\n")
                process.stdin.flush()
        return json.loads(self.answers()[0])

    def start(self):
        environment = os.environ | {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        environment["TORCHELASTIC_USE_AGENT_STORE"] = (
            "True"  # as under torchrun, which holds the store as well
        )
        for rank in range(2):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (self.folder / f"rank-{rank}.err").open("w") as errors:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", RANK],
                        env=environment | place,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                    )
                )

    def answers(self):
        """A line of each process. If one dies, the other would wait for it for half an hour: both
        are ended."""
        waiting, found = {p.stdout: rank for rank, p in enumerate(self.processes)}, {}
        deadline = time.monotonic() + self.TIMEOUT_S
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], max(0, deadline - time.monotonic()))
            lines = {waiting.pop(stream): stream.readline() for stream in ready}
            if not ready or not all(lines.values()):
                self.show_stacks()
                what = (
                    f"rank {', '.join(map(str, lines))} died"
                    if ready
                    else f"no answer in {self.TIMEOUT_S} s"
                )
                self.stop()
                said = "\n".join(f"rank {r}: {self.said(r)}" for r in range(2))
                raise AssertionError(f"run {self.runs}: {what}\n{said}")
            found |= lines
        return found

    def show_stacks(self):
        for process in self.processes:
            process.send_signal(signal.SIGUSR1)
        time.sleep(1)

    def said(self, rank):
        return (self.folder / f"rank-{rank}.err").read_text()[-6000:]

    def stop(self):
        for process in self.processes:
            process.kill()
            process.communicate()
        self.processes = []


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = Pair(tmp_path_factory.mktemp("pair"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    rows = [{"text": f"The square of {i} is {i * i}. " * 6} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path), tokenizer="bytes")


def settings(data, out, router, **overrides):
    recursions = 3
    values = dict(
        model=preset(
            "tiny", num_recursions=recursions, router=router, num_layers=5, max_seq_len=64
        ),
        data=data,
        out=str(out),
        steps=8,
        batch_size=2,
        seq_len=32,
        eval_every=4,
        eval_windows=4,
        log_every=1,
        optim=OptimConfig(lr=1e-3),
        device="cpu",
    )
    return TrainConfig(**(values | overrides))


def alone(config, **settings):
    return train(config, console=Console(file=io.StringIO()), **settings)


def curve(out, *names):
    rows = RunFolder(out).read_metrics()
    return [[row[n] for n in names] for row in rows if all(n in row for n in names)]


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("ddp", ("fixed", "token", "random", "elastic")),
        ("fsdp", ("expert", "token-free")),
        pytest.param("ddp", ("expert", "token-free"), marks=pytest.mark.slow),
        pytest.param("fsdp", ("elastic",), marks=pytest.mark.slow),
        pytest.param("fsdp", ("fixed", "token", "random"), marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_as_one(how, names, data, tmp_path, pair):
    for name in names:
        router, short = ROUTERS[name], dict(steps=6, eval_every=3) | BESIDE.get(name, {})
        pair(settings(data, tmp_path / f"two-{name}", router, parallel=how, **short))
        result = alone(settings(data, tmp_path / f"one-{name}", router, batch_size=4, **short))
        for what in (
            ["loss"],
            ["validation_nll"],
            ["grad_norm"],
            ["share_per_recursion"],
            ["tokens", "flops"],
        ):
            ours, theirs = (
                torch.tensor(curve(tmp_path / f"{n}-{name}", *what)).double()
                for n in ("two", "one")
            )
            torch.testing.assert_close(
                ours, theirs, atol=1e-5, rtol=1e-5, msg=lambda m, n=name, w=what: f"{n} {w}: {m}"
            )
        for extra in {
            "expert": ["agreement", "selection", "z_loss"],
            "token": ["max_violation", "balancing"],
            "elastic": ["gain", "exits"],
        }.get(name, []):
            ours, theirs = (
                torch.tensor(curve(tmp_path / f"{n}-{name}", extra)) for n in ("two", "one")
            )
            torch.testing.assert_close(
                ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda m, e=extra: f"{e}: {m}"
            )
        loaded = checkpoint.load(tmp_path / f"two-{name}").model
        for (key, a), b in zip(
            loaded.state_dict().items(), result.state.model.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(
                a, b, atol=2e-4, rtol=2e-3, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_accumulation_reduces_once_per_step_and_fsdp_gathers_each_unit_once(
    how, data, tmp_path, pair
):
    """The recursions are one unit: gathered once, not once per recursion; the router is another,
    the rest of the model the third."""
    common = dict(steps=3, eval_every=100, eval_windows=1, parallel=how)
    many, few = (
        settings(data, tmp_path / name, ROUTERS["expert"], accumulate=k, **common)
        for name, k in [("a", 4), ("b", 1)]
    )
    counts = [pair(many), pair(few)]
    reduced = "_reduce_scatter_base_" if how == "fsdp" else "allreduce_"
    assert counts[0][reduced] == counts[1][reduced], (
        "nothing is reduced before the last forward of a step"
    )
    if how == "fsdp":
        assert counts[1][reduced] == 3 * 3, "three units, once per step"
        gathered = [c["_allgather_base_"] for c in counts]
        assert gathered[1] == 3 * 3 + 3, (
            "three units per training step and in the evaluation at the end"
        )
        assert gathered[0] == gathered[1], "once per step, however many forwards it has"
    one = alone(
        settings(
            data,
            tmp_path / "one",
            ROUTERS["expert"],
            accumulate=8,
            **(common | {"parallel": "ddp"}),
        )
    )
    assert one.state.tokens == 3 * 8 * 2 * 32
    ours, theirs = (
        torch.tensor(curve(tmp_path / n, "tokens", "loss")).double() for n in ("a", "one")
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_questions_to_all_ranks_are_one_wait_and_none_for_a_process_alone(monkeypatch):
    other = torch.tensor([0.0, 1.0, 0.0])
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda x, _: x.copy_(torch.maximum(x, other))
    )
    with Waits() as waits:
        assert ALONE.any(True, False, False) == [True, False, False]
    assert waits.seen == []
    with Waits() as waits:
        two = Ranks(0, 2, torch.device("cpu"))
        assert two.any(True, False, False) == [True, True, False]
    assert waits.seen == ["tolist"]


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_under_torchrun_a_rank_touches_no_gpu_but_its_own(device, monkeypatch):
    used = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: used.append(("current", place)))
    monkeypatch.setattr(
        torch, "empty", lambda *_, device: (used.append(("memory", device)), torch.zeros(1))[1]
    )
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *backend: used.append(backend))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 6)
    own = torch.device("cuda", 2)
    with ranks(device) as found:
        assert found == Ranks(6, 4, own)
    assert used == [("memory", own), ("current", own), ("nccl",), ()]


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield ALONE
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("router", ["expert", "token", "fixed"])
def test_fsdp_gathers_bfloat16_but_routes_averages_and_keeps_float32(router, one_rank):
    model, plain = (tiny(ROUTERS[router], dim=32, head_dim=8, ffn_dim=64) for _ in range(2))
    tokens, seen = random_tokens(2, 30), {}

    def see(name):
        def hook(module, arguments, output):
            seen[name] = (module.weight.dtype, arguments[0].dtype)

        return hook

    parts = {
        "block": model.coda[0].attention.q_proj,
        "norm": model.recursions.shared_blocks[0].attention_norm,
    }
    if router != "fixed":
        parts["router"] = model.router.nets[1] if router == "expert" else model.router.net
    for name, module in parts.items():
        module.register_forward_hook(see(name))
    shard(model, one_rank, low=True)
    for last in (False, True):  # as with two batches in a step
        with reducing(model, last), autocast(torch.device("cpu"), "bfloat16"):
            loss = compute_loss(model(tokens, targets_BT=tokens, selection="topk"))
        loss.backward()
        with autocast(torch.device("cpu"), "bfloat16"):
            expected = compute_loss(plain(tokens, targets_BT=tokens, selection="topk"))
        expected.backward()
    low, full = torch.bfloat16, torch.float32
    assert seen["block"][0] == low and seen["norm"] == (low, full)
    assert seen.get("router", (full, full)) == (full, full)
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == full
        difference = (p.grad.full_tensor() - q.grad).norm() / q.grad.norm()
        assert difference < 0.2, (name, difference)


def test_fsdp_in_bfloat16_learns_as_one_process_does_and_saves_float32(data, tmp_path, pair):
    low = dict(precision="bfloat16", parallel="fsdp")
    pair(settings(data, tmp_path / "two", ROUTERS["expert"], **low))
    alone(settings(data, tmp_path / "one", ROUTERS["expert"], batch_size=4, precision="bfloat16"))
    alone(settings(data, tmp_path / "exact", ROUTERS["expert"], batch_size=4))
    two, one, exact = (
        torch.tensor(curve(tmp_path / name, "loss")) for name in ("two", "one", "exact")
    )
    torch.testing.assert_close(two, one, atol=0.02, rtol=0)
    assert not torch.equal(one, exact) and two[-1] < two[0] - 0.05
    for tensor in checkpoint.load(tmp_path / "two", dtype=None).model.state_dict().values():
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_run_goes_on_with_another_number_of_ranks(how, data, tmp_path, pair):
    whole = settings(
        data, tmp_path / "whole", ROUTERS["expert"], batch_size=4, save_every=4, keep=0
    )
    alone(whole)
    expected = curve(tmp_path / "whole", "step", "loss")

    shrinking = settings(
        data, tmp_path / "shrinking", ROUTERS["expert"], parallel=how, save_every=4, keep=0
    )
    pair(shrinking)
    remove_folder(RunFolder(tmp_path / "shrinking").checkpoint(8))
    saved = load_config(RunFolder(tmp_path / "shrinking").settings)
    alone(dataclasses.replace(saved, batch_size=4), resume=True)
    assert torch.tensor(curve(tmp_path / "shrinking", "step", "loss")) == pytest.approx(
        torch.tensor(expected), abs=1e-5
    )

    remove_folder(RunFolder(tmp_path / "whole").checkpoint(8))
    growing = load_config(RunFolder(tmp_path / "whole").settings)
    pair(dataclasses.replace(growing, batch_size=2, parallel=how), resume=True)
    assert torch.tensor(curve(tmp_path / "whole", "step", "loss")) == pytest.approx(
        torch.tensor(expected), abs=1e-5
    )


def test_a_rank_that_dies_ends_the_run_at_once(data, tmp_path):
    """What the tests above rely on: a pair never hangs without a word."""
    pair = Pair(tmp_path)
    pair.start()
    pair.processes[1].kill()
    with pytest.raises(AssertionError, match=r"run 1: rank 1 died"):
        pair(settings(data, tmp_path / "run", ROUTERS["fixed"]))
    assert not pair.processes


def test_muon_learns_and_refuses_shards(data, tmp_path):
    muon = OptimConfig(name="muon", lr=3e-3)
    config = settings(data, tmp_path / "a", ROUTERS["expert"], optim=muon, batch_size=4, steps=20)
    result = alone(config)
    losses = [row[0] for row in curve(tmp_path / "a", "loss")]
    assert losses[-1] < 0.8 * losses[0]
    adamw, matrices = result.state.optimizers
    assert type(matrices).__name__ == "Muon" and all(
        p.ndim == 2 for g in matrices.param_groups for p in g["params"]
    )
    held = [p for o in (adamw, matrices) for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(result.state.model.parameters()))
    remove_folder(result.path)
    again = alone(config, resume=True)
    for a, b in zip(again.state.model.parameters(), result.state.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="needs whole matrices"):
        settings(data, tmp_path / "b", ROUTERS["expert"], optim=muon, parallel="fsdp")
