"""Budgets, branches and settings that are kept."""

import dataclasses

import pytest
import torch

from mor.files import remove_folder
from mor.run_folder import RunFolder
from mor.training.config import branch, capacities_at, load_config, total_steps
from mor.training.loop import train
from mor.training.optim import OptimConfig
from tests.training.small_run import metrics, quiet, settings


def test_a_branch_decays_from_the_stable_phase(squares, tmp_path):
    stable = settings(squares, tmp_path / "long", steps=20, save_every=5, keep=0)
    train(stable, console=quiet())
    start = RunFolder(tmp_path / "long").checkpoint(10)
    config = branch(start, cooldown_steps=4, out=str(tmp_path / "short"))
    result = train(dataclasses.replace(config, log_every=1), console=quiet())
    assert result.finished and result.state.step == 14 and result.state.tokens == 14 * 4 * 32
    rows = [row for row in metrics(tmp_path / "short") if "lr" in row]
    assert [row["step"] for row in rows] == [11, 12, 13, 14]
    assert [row["lr"] / stable.optim.lr for row in rows] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    direct = settings(
        squares, tmp_path / "direct", steps=14, optim=OptimConfig(warmup=1 / 14, cooldown=4 / 14)
    )
    same = train(direct, console=quiet())  # warms up over the same single step
    for a, b in zip(result.state.model.parameters(), same.state.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"at step 20; a branch needs .* steps 1 to 16"):
        branch(tmp_path / "long", cooldown_steps=4, out=str(tmp_path / "no"))


def test_a_resumed_branch_starts_where_the_branch_did(squares, tmp_path):
    train(settings(squares, tmp_path / "long", steps=20, save_every=5, keep=0), console=quiet())
    start = RunFolder(tmp_path / "long").checkpoint(10)
    config = branch(start, cooldown_steps=4, out=str(tmp_path / "short"))
    first = train(config, console=quiet())
    remove_folder(first.path)
    again = train(config, resume=True, console=quiet())
    for a, b in zip(first.state.model.parameters(), again.state.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_keeps_its_settings(squares, tmp_path):
    config = settings(squares, tmp_path / "run", steps=1)
    result = train(config, console=quiet())
    kept = load_config(RunFolder(tmp_path / "run").settings)
    assert (
        kept.model == result.state.model.config
        and kept.optim == config.optim
        and kept.data == squares
    )


def test_a_flop_budget_is_spent_to_within_a_step(squares, tmp_path):
    config = settings(squares, tmp_path / "run", flops=2e9, capacity_warmup_steps=4, eval_every=100)
    result = train(config, console=quiet())
    # the vocabulary comes from the tokenizer, so the spent budget is what counts, not the planned
    # steps
    assert abs(result.state.flops / 2e9 - 1) < 0.1
    assert result.state.step == total_steps(load_config(RunFolder(tmp_path / "run").settings))


def test_capacity_warm_up_falls_from_one(squares, tmp_path):
    config = settings(squares, tmp_path, capacity_warmup_steps=10)
    assert capacities_at(config, 0) == (1.0, 1.0)
    assert capacities_at(config, 5) == pytest.approx((1.0, 0.75))
    assert capacities_at(config, 10) == (1.0, 0.5)
