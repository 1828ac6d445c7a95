"""Steady loads to measure."""

from mor.engine.bench import Lengths, load_for
from tests.conftest import tiny


def test_a_steady_load_starts_full():
    load = load_for("", tiny(), batch=24, slots=24, lengths=Lengths(mean=6, deviation=3))
    assert len(load.engine.requests) == 24
    load.turn(0.05)
    assert len(load.engine.requests) == 24
