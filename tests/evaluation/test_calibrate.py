"""Calibration: the mean depth that is asked for is spent on text that was not seen."""

import pytest
import torch

from mor.evaluation.calibrate import calibrate, fit_table, threshold_for
from mor.evaluation.nll import evaluate
from mor.model.budget import EVERYONE, NOBODY
from mor.model.config import RouterConfig
from tests.budgets import GAIN, text
from tests.conftest import tiny


@pytest.mark.parametrize("kind", ["expert_choice", "token_choice"])
def test_what_is_asked_for_is_spent_on_other_text(kind):
    model = tiny(kind, kv_strategy="hybrid" if kind == "expert_choice" else "recursion_wise")
    table = calibrate(model, text(3200), seq_len=25, deepest=4, kinds={"other": text(3000, seed=1)})
    assert table.reachable() == [(1.0, 4.0)] and table.checked == (1.5, 2.0, 2.5, 3.0, 4.0)
    for depth, held_out, other in zip(table.checked, *table.spent.values(), strict=True):
        assert held_out == pytest.approx(depth, rel=0.05) and other == pytest.approx(
            depth, rel=0.05
        )
    assert model.depth_table is table
    found = evaluate(model, text(1600, seed=2), seq_len=25, depth=1.7)  # between the checked ones
    assert found.mean_depth == pytest.approx(1.7, rel=0.05) and found.causal


def test_where_gains_are_predicted_one_threshold_serves_all_recursions():
    model = tiny(GAIN, kv_strategy="final")
    table = calibrate(model, text(2000), seq_len=25, deepest=4)
    assert table.reachable() == [(1.0, 4.0)] and table.checked == (1.5, 2.0, 2.5, 3.0, 4.0)
    for row in table.thresholds:
        assert len({threshold for threshold in row if threshold < NOBODY}) <= 1
    falling = [min(row) for row in table.thresholds]
    assert falling == sorted(falling, reverse=True), "more budget takes what is worth less"
    for depth, spent in zip(table.checked, table.spent["held out"], strict=True):
        assert spent == pytest.approx(depth, rel=0.1)  # few tokens of 37 take most recursions


def test_equal_weights_and_text_give_equal_tables():
    settings = dict(seq_len=23, max_windows=6, deepest=4)
    assert calibrate(tiny(), text(400), **settings) == calibrate(tiny(), text(400), **settings)


def test_scores_that_are_all_equal_leave_whole_depths_alone():
    """The table holds what can be had, and everything else is refused by name."""
    model = tiny(RouterConfig(kind="expert_choice"))
    with torch.no_grad():
        for net in model.router.nets:
            net.weight.zero_()
    table = calibrate(model, text(400), seq_len=23, max_windows=6, deepest=4)
    assert table.reachable() == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0)]
    with pytest.raises(ValueError, match="cannot be had from this model; it has 1, 2, 3, 4"):
        evaluate(model, text(400), seq_len=23, depth=1.5)


@pytest.mark.parametrize("count", range(8))
def test_a_threshold_is_reached_by_as_many_as_wanted_or_as_near_as_equal_scores_allow(count):
    scores = torch.tensor([3.0, -1.0, 2.0, 2.0, 2.0, 0.5, 7.0])
    threshold = threshold_for(scores, count)
    reached = int((scores >= threshold).sum())
    possible = {int((scores >= t).sum()) for t in (*scores.tolist(), NOBODY)}
    assert abs(reached - count) == min(abs(n - count) for n in possible)
    assert (threshold == NOBODY) == (reached == 0) and (threshold == EVERYONE) == (reached == 7)


def test_what_cannot_be_calibrated_says_so():
    with pytest.raises(ValueError, match="one depth"):
        calibrate(tiny("fixed", num_recursions=1), text(400), seq_len=23)
    with pytest.raises(ValueError, match="two windows"):
        calibrate(tiny(), text(30), seq_len=23)
    with pytest.raises(ValueError, match="deepest=2 is below"):
        calibrate(tiny(), text(400), seq_len=23, deepest=2)
    for settings in (dict(max_depth=2), dict(selection="topk")):
        with pytest.raises(ValueError, match="depth"):
            evaluate(tiny("random"), text(400), seq_len=23, depth=2, **settings)


@pytest.mark.parametrize("kind", ["expert_choice", GAIN], ids=["shares", "one threshold"])
def test_what_is_measured_for_some_budgets_alone_is_the_same_for_them(kind):
    model = tiny(kind, kv_strategy="hybrid")
    data = text(1000)
    batch, wanted = data.batch(data.spread(25), 25), [1.0, 1.5, 2.2, 4.0]
    whole, some = fit_table(model, batch, 4), fit_table(model, batch, 4, wanted=wanted)
    assert len(some.budgets) < len(whole.budgets)
    for depth in wanted:
        assert some.has(depth) and some.at(depth) == pytest.approx(whole.at(depth), rel=1e-6)
