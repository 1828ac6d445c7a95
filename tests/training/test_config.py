"""Budgets and settings that are kept."""

import dataclasses

import pytest

from mor.run_folder import RunFolder
from mor.training.config import capacities_at, load_config, step_flops, total_steps
from mor.training.loop import train
from tests.training.small_run import quiet, settings


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


def test_a_budget_below_one_step_is_refused_and_one_within_the_warm_up_is_met(squares, tmp_path):
    config = settings(squares, tmp_path, capacity_warmup_steps=10)
    one = step_flops(config, 0)
    with pytest.raises(ValueError, match=r"flops=1000 is less than the .* of a single step"):
        total_steps(dataclasses.replace(config, flops=1e3))
    assert total_steps(dataclasses.replace(config, flops=one)) == 1
    for steps in (3, 10, 14):
        spent = sum(step_flops(config, step) for step in range(steps))
        assert total_steps(dataclasses.replace(config, flops=spent)) == steps


@pytest.mark.parametrize("name", ["save_every", "save_minutes", "keep", "max_skipped", "flops"])
def test_negative_settings_are_refused(squares, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be .*, got -1"):
        settings(squares, tmp_path, **{name: -1})


def test_an_empty_folder_is_refused_where_it_is_written(squares):
    with pytest.raises(ValueError, match="out is empty; name a folder"):
        settings(squares, "")
