"""Budgets and settings that are kept."""

import dataclasses

import pytest

from mor.model.config import RouterConfig
from mor.run_folder import RunFolder
from mor.training.config import (
    capacities_at,
    exit_rows_at,
    load_config,
    step_flops,
    total_flops,
    total_steps,
)
from mor.training.loop import train
from tests.training.small_run import quiet, settings

GAIN = RouterConfig(kind="expert_choice", causal_selection="gain")


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


def test_full_steps_are_spread_evenly_and_counted(squares, tmp_path):
    config = settings(squares, tmp_path, full_depth_share=0.4, exit_share=0.25, batch_size=8)
    full = [capacities_at(config, step) == (1.0, 1.0) for step in range(200)]
    assert abs(sum(full) - 80) <= 1
    assert all(1 <= sum(full[i : i + 5]) <= 3 for i in range(195))
    assert [exit_rows_at(config, step) for step in range(200)] == [2 * each for each in full]
    assert step_flops(config, full.index(True)) > step_flops(config, full.index(False))
    for steps in (3, 30, 200):
        config = dataclasses.replace(config, steps=steps)
        spent = sum(step_flops(config, step) for step in range(steps))
        assert total_flops(config) == pytest.approx(spent)
        assert abs(total_steps(dataclasses.replace(config, flops=spent)) - steps) <= 1


def test_recursions_are_drawn_evenly_and_those_beyond_the_trained_ones_counted(squares, tmp_path):
    drawn = dict(full_depth_share=0.5, exit_share=0.25, recursions_drawn=(1, 4))
    config = settings(squares, tmp_path, **drawn)
    taken = [len(capacities_at(config, step)) for step in range(400)]
    full = [min(capacities_at(config, step)) == 1 for step in range(400)]
    assert all(taken[i] == 2 for i in range(400) if not full[i])
    often = [sum(f and n == r for f, n in zip(full, taken, strict=True)) for r in (1, 2, 3, 4)]
    assert all(45 <= count <= 55 for count in often)
    costs = {taken[i]: step_flops(config, i) for i in range(400) if full[i]}
    assert costs[1] < costs[2] < costs[3] < costs[4]
    assert costs[4] - costs[3] == pytest.approx(costs[3] - costs[2])
    rows = {taken[i]: exit_rows_at(config, i) for i in range(400) if full[i]}
    assert rows[1] == 0 < rows[2] == rows[4], "one recursion has no exit before its end"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(exit_share=0.2), "exit_share needs several recursions and steps"),
        (dict(router="gain", exit_share=0.2), "measures gains by itself"),
        (dict(router="fixed", full_depth_share=0.5), "full_depth_share needs a router"),
        (dict(recursions_drawn=(1, 4)), "recursions_drawn=.* full_depth_share"),
        (dict(full_depth_share=0.5, recursions_drawn=(4, 1)), "two numbers that do not fall"),
        (dict(router=GAIN), "learns from exits alone; set full_depth_share=0.5 and exit_share"),
    ],
)
def test_settings_that_train_no_exit_are_refused(squares, tmp_path, changes, reason):
    with pytest.raises(ValueError, match=reason):
        settings(squares, tmp_path, **changes)
