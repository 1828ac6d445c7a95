"""Steady loads to measure."""

import pytest

from mor.engine.bench import Lengths, load_for, shares
from mor.model.config import RouterConfig, preset
from tests.conftest import tiny


def test_a_steady_load_starts_full():
    load = load_for("", tiny(), batch=24, slots=24, lengths=Lengths(mean=6, deviation=3))
    assert len(load.engine.requests) == 24
    load.turn(0.05)
    assert len(load.engine.requests) == 24


def test_shares_have_the_measured_mean_depth_also_where_tokens_take_none():
    for capacities, depth, expected in (
        ((1.0, 0.5, 0.25), 1.375, [1.0, 0.25, 0.125]),
        ((0.5, 0.3, 0.2), 0.5, [0.25, 0.15, 0.1]),
    ):
        router = RouterConfig(kind="random", capacities=capacities)
        config = preset("tiny", num_recursions=3, router=router)
        assert shares(config, depth) == pytest.approx(expected)
