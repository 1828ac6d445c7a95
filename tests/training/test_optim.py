"""Schedules of the learning rate."""

import pytest

from mor.training.optim import OptimConfig, learning_rate


def test_schedules():
    trapezoid = OptimConfig(lr=1.0, warmup=0.1, cooldown=0.2)
    rates = [learning_rate(trapezoid, s, 100) for s in range(100)]
    assert rates[:2] == pytest.approx([0.1, 0.2]) and rates[9:81] == pytest.approx([1.0] * 72)
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)
    cosine = OptimConfig(lr=1.0, warmup=0.1, schedule="cosine", final_lr=0.1)
    rates = [learning_rate(cosine, s, 100) for s in range(100)]
    assert (
        max(rates) == pytest.approx(1.0) and rates[55] == pytest.approx(0.55) and rates[99] < 0.11
    )
    with pytest.raises(ValueError, match="add up to at most 1"):
        OptimConfig(warmup=0.5, cooldown=0.6)
