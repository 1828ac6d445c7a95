"""Depth budgets: what they ask for, and that they are a causal rule of each token."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mor.model.budget import (
    EVERYONE,
    NOBODY,
    DepthTable,
    budget_of,
    corners,
    even_table,
    router_for,
    shares_of,
)
from mor.model.config import ModelConfig, RouterConfig
from mor.model.kv_cache import KVCache
from tests.budgets import DEPTHS, calibrated
from tests.conftest import KV_STRATEGIES, ROUTERS, random_tokens, some, tiny


def some_models():
    """Every router with one strategy for keys and values each; ``slow`` with all of them."""
    for i, name in enumerate(ROUTERS):
        strategies = ["recursion_wise"] if name.endswith("from-0") else KV_STRATEGIES
        for k, kv in enumerate(strategies):
            marks = () if len(strategies) == 1 or (i + k) % 3 == 0 else pytest.mark.slow
            yield pytest.param(name, kv, id=f"{name}-{kv}", marks=marks)
    yield pytest.param("gain", "final", id="gain-final")
    for kv in ("hybrid", "final"):
        yield pytest.param("deepened", kv, id=f"deepened-{kv}")


@pytest.mark.parametrize("capacities", [None, (1.0, 1.0, 0.75, 0.5), (1.0, 1.0, 1.0, 1.0)])
@pytest.mark.parametrize("deepest", [4, 7])
def test_shares_have_the_mean_that_was_asked_for_and_never_fall(capacities, deepest):
    config = ModelConfig(
        num_recursions=4,
        shared_layers=1,
        router=RouterConfig(kind="expert_choice", capacities=capacities),
    )
    path = corners(config, deepest)
    budgets = [1 + i * (deepest - 1) / 60 for i in range(61)]
    found = [shares_of(path, budget) for budget in budgets]
    for budget, shares in zip(budgets, found, strict=True):
        assert sum(shares) == pytest.approx(budget)
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(shares)), "deeper holds no more"
    for less, more in itertools.pairwise(found):
        assert all(a <= b + 1e-12 for a, b in zip(less, more, strict=True))
    own = shares_of(path, sum(config.capacities))
    assert own == pytest.approx([*config.capacities, *[0] * (deepest - 4)])


@torch.no_grad()
@pytest.mark.parametrize(("name", "kv"), some(some_models(), 2))
def test_budgets_decode_as_they_read_also_in_one_batch(name, kv):
    """Full forward = piece by piece with a cache = each row alone = padded, with another depth in
    every row; and without a depth nothing changes."""
    model, tokens = calibrated(name, kv), random_tokens(6, 13)
    router = router_for(model, DEPTHS)
    full = model(tokens, router=router)
    for chunks in ([1] * 6 + [4, 1, 2],):
        cache = KVCache(model.config, 6, num_recursions=router.num_recursions)
        parts = [model(t, cache=cache, router=router) for t in tokens.split(chunks, dim=1)]
        depths = torch.cat([part.routing.depth_BT for part in parts], dim=1)
        assert torch.equal(depths, full.routing.depth_BT)
        logits = torch.cat([part.logits_BTV for part in parts], dim=1)
        assert (logits - full.logits_BTV).abs().max() < 1e-4
    mask = torch.ones(6, 15, dtype=torch.bool)
    mask[:, [2, 9]] = False
    spread = torch.zeros(6, 15, dtype=torch.int64).masked_scatter(mask, tokens)
    padded = model(spread, mask_BT=mask, router=router)
    assert torch.equal(padded.routing.depth_BT[mask].view(6, 13), full.routing.depth_BT)
    for row, depth in enumerate(DEPTHS):
        alone = model(tokens[row : row + 1], router=router_for(model, depth))
        assert torch.equal(alone.routing.depth_BT[0], full.routing.depth_BT[row])
        assert (alone.logits_BTV[0] - full.logits_BTV[row]).abs().max() < 1e-4
    assert torch.equal(full.routing.depth_BT[1], model(tokens[1:2]).routing.depth_BT[0])
    assert full.routing.depth_BT[2].eq(3).all() and full.routing.depth_BT[5].eq(1).all()
    assert len(full.routing.depth_BT[3].unique()) > 1


@torch.no_grad()
@pytest.mark.parametrize(("name", "kv"), [*some_models()])
def test_with_a_budget_future_tokens_change_no_earlier_logit(name, kv):
    model = calibrated(name, kv)
    tokens, router = random_tokens(6, 13), router_for(model, DEPTHS)
    before = model(tokens, router=router)
    for cut in (1, 7):
        changed = torch.cat([tokens[:, :cut], (tokens[:, cut:] + 5) % 37], dim=1)
        after = model(changed, router=router)
        earlier = (slice(None), slice(cut))
        assert torch.equal(before.routing.depth_BT[earlier], after.routing.depth_BT[earlier])
        assert (before.logits_BTV[earlier] - after.logits_BTV[earlier]).abs().max() < 1e-6
        assert (before.logits_BTV[:, cut:] - after.logits_BTV[:, cut:]).abs().max() > 1e-3


@torch.no_grad()
def test_a_further_recursion_is_decided_and_gated_as_the_last_trained_one():
    """All tokens to the end equals a model that has that many recursions, the further ones with the
    last one's router."""
    model, tokens = calibrated("expert"), random_tokens(2, 11)
    longer = tiny(
        RouterConfig(kind="expert_choice", capacities=(1.0,) * 5),
        num_recursions=5,
        num_layers=2 + 2 * 5,
    )
    state = model.state_dict()
    for name in list(longer.state_dict()):
        same = name.replace("nets.3", "nets.2").replace("nets.4", "nets.2")
        if "threshold" not in name:
            longer.state_dict()[name].copy_(state[same])
    torch.testing.assert_close(
        model(tokens, router=router_for(model, 5)).logits_BTV,
        longer(tokens).logits_BTV,
        atol=1e-5,
        rtol=1e-5,
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["fixed", "random", "position", "frequency"])
def test_routers_that_learn_nothing_need_no_calibration(kind):
    """Their scores spread evenly, so thresholds follow from the shares; and who goes deep with a
    small budget goes as deep with a larger one."""
    model, tokens = tiny(kind), random_tokens(8, 60)
    depths = [1.3, 2, 2.7, 4.4, 6]
    found = [model(tokens, router=router_for(model, d)).routing.depth_BT for d in depths]
    for depth, spent in zip(depths, found, strict=True):
        assert spent.float().mean() == pytest.approx(depth, rel=0.05)
    for less, more in itertools.pairwise(found):
        assert (less <= more).all()


def test_a_budget_opens_no_more_recursions_than_it_needs():
    """So that caches and passes for the others are not needed."""
    model = calibrated("expert")
    assert [budget_of(model, d).recursions for d in (1, 1.3, 2.4, None, "full", 4.5, 5)] == [
        1, 2, 3, 3, 3, 5, 5
    ]  # fmt: skip


@pytest.mark.parametrize("depth", [0.5, math.nan, math.inf, "half", True, [2.0]])
def test_what_is_no_depth_is_refused(depth):
    with pytest.raises(ValueError, match="from 1 on, or 'full'"):
        budget_of(calibrated("expert"), depth)


def test_what_cannot_be_had_says_why():
    with pytest.raises(ValueError, match="mor calibrate"):
        router_for(tiny("expert_choice"), 2)
    with pytest.raises(ValueError, match="one depth"):
        router_for(tiny("fixed", num_recursions=1), 1)
    with pytest.raises(ValueError, match="shared_order"):
        router_for(tiny("fixed", sharing="sequence"), 2)
    with pytest.raises(ValueError, match="it has 1 to 5"):
        router_for(calibrated("expert"), 5.5)
    with pytest.raises(ValueError, match="2 depths for a batch of 3 rows"):
        calibrated("expert")(random_tokens(3, 4), router=router_for(calibrated("expert"), [2, 3]))


def test_a_table_with_a_gap_names_what_can_be_had():
    rows = [(NOBODY, NOBODY), (0.5, NOBODY), (EVERYONE, EVERYONE)]
    table = DepthTable(budgets=(1.0, 1.2, 3.0), thresholds=tuple(rows))
    assert table.reachable() == [(1.0, 1.2), (3.0, 3.0)]
    assert table.at(2.99) == list(rows[2])
    with pytest.raises(ValueError, match=r"depth=2 cannot be had .* 1 to 1.2, 3"):
        table.at(2)


def test_thresholds_between_two_budgets_lie_between_theirs():
    table = even_table(tiny("random").config, 4)
    for budget in (1.11, 2.5, 3.3):
        shares = shares_of(corners(tiny("random").config, 4), budget)
        assert table.at(budget) == pytest.approx([1 - share for share in shares[1:]])


@pytest.mark.parametrize("change", [dict(budgets=(1.0, 1.0)), dict(thresholds=((1.0,),))])
def test_a_damaged_table_is_refused(change):
    table = DepthTable(budgets=(1.0, 2.0), thresholds=((1.0,), (0.0,)))
    with pytest.raises(ValueError, match="depth_table is damaged"):
        replace(table, **change)


@pytest.mark.parametrize("make", [np.float32, np.float64, torch.tensor])
def test_depths_are_numbers_of_any_library(make):
    model = calibrated("random")
    assert budget_of(model, make(2.0)) == budget_of(model, 2.0)
    found = router_for(model, make(2.0)).threshold_BR
    assert torch.equal(found, router_for(model, 2.0).threshold_BR)
    assert budget_of(model, np.int64(2)) == budget_of(model, 2)
    with pytest.raises(ValueError, match="from 1 on"):
        budget_of(model, np.float32(0))


def test_a_depth_beyond_the_table_says_how_to_have_it():
    with pytest.raises(ValueError, match=r"it has 1 to 5; mor calibrate --deepest 8 would"):
        budget_of(calibrated("expert"), 7.5)
