"""Loss against mean depth and time."""

import pytest

from mor.evaluation.depth_curve import depth_curve
from mor.evaluation.nll import evaluate
from mor.model.budget import curve_depths
from tests.budgets import calibrated, text
from tests.conftest import tiny


def test_each_depth_has_the_loss_of_its_own_evaluation_in_the_order_asked_for():
    model, data, depths = calibrated("expert"), text(200), ["full", 1.6, 4.3]
    settings = dict(seq_len=23, max_windows=4)
    curve = depth_curve(model, data, depths, **settings)
    for depth, at in zip(depths, curve, strict=True):
        assert at.depth == depth and at.found == evaluate(model, data, depth=depth, **settings)
        assert at.tokens_per_second > 0
        assert at.to_row()["microseconds_per_token"] == pytest.approx(1e6 / at.tokens_per_second)


def test_a_depth_that_cannot_be_had_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.delattr("mor.evaluation.depth_curve.evaluate")
    with pytest.raises(ValueError, match="cannot be had"):
        depth_curve(calibrated("expert"), text(200), [1.6, 9.0], seq_len=23)


def test_a_curve_goes_from_one_recursion_to_the_deepest_of_the_table():
    assert curve_depths(calibrated("expert")) == [1, 1.5, 2, 2.5, 3, "full", 4, 5]
    assert curve_depths(tiny("random")) == [1, 1.5, 2, 2.5, 3, "full", 4, 5, 6]
    with pytest.raises(ValueError, match="run mor calibrate"):
        curve_depths(tiny("expert_choice"))
