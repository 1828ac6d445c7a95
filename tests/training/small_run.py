"""A small run to train."""

import io
import json
import math

from rich.console import Console

from mor.data.stream import Batch
from mor.model.config import RouterConfig, preset
from mor.run_folder import RunFolder
from mor.training.config import TrainConfig
from tests.conftest import random_tokens

LOSS_FREE = RouterConfig(kind="token_choice", balancing="loss_free")
BY_GAIN = RouterConfig(kind="expert_choice", causal_selection="gain", gate="residual", alpha=1.0)
WITH_EXITS = dict(full_depth_share=0.5, exit_share=0.25, exit_weight=0.3)


def settings(squares, out, router="expert_choice", **overrides):
    recursions = 1 if router == "fixed" else 2
    values = dict(
        model=preset(
            "tiny", num_recursions=recursions, router=router, num_layers=4, max_seq_len=64
        ),
        data=squares,
        out=str(out),
        steps=12,
        batch_size=4,
        seq_len=32,
        eval_every=6,
        log_every=3,
    )
    return TrainConfig(**(values | overrides))


def quiet():
    return Console(file=io.StringIO())


def metrics(out):
    return [json.loads(line) for line in RunFolder(out).metrics.read_text().splitlines()]


def poisoned(monkeypatch, steps):
    """Batches of these steps give a loss that is not finite."""
    import mor.training.step as module

    real = module.compute_loss

    def loss(output):
        loss.calls += 1
        if loss.calls in steps:
            output.nll.data.fill_(math.nan)
        return real(output)

    loss.calls = 0
    monkeypatch.setattr(module, "compute_loss", loss)


def batch_of(model, rows=3, length=11):
    ids = random_tokens(rows, length + 1)
    targets = ids[:, 1:].clone()
    targets[:, ::3] = -100
    return Batch(ids[:, :-1].contiguous(), targets)
