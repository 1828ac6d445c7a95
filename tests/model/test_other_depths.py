"""Routers that send tokens to other depths than the trained one would."""

import pytest
import torch

from mor.model.config import RouterConfig
from mor.model.kv_cache import KVCache
from mor.model.other_depths import ForcedRouter, RepeatLastRouter
from tests.conftest import cases, random_tokens, tiny


@pytest.mark.parametrize("make", cases("pairs", with_final=True))
def test_a_table_of_the_routers_own_decisions_changes_nothing(make):
    model, tokens = make(), random_tokens(2, 11)
    output = model(tokens)
    again = model(tokens, router=ForcedRouter(model.router, output.routing.taken_RM))
    torch.testing.assert_close(again.logits_BTV, output.logits_BTV, atol=1e-5, rtol=1e-5)
    assert torch.equal(again.routing.depth_BT, output.routing.depth_BT)


@pytest.mark.parametrize("make", cases("pairs", with_final=True))
def test_further_recursions_capped_at_the_trained_depth_change_nothing(make):
    model, tokens = make(), random_tokens(2, 11)
    longer = model(tokens, router=RepeatLastRouter(model.router, 5), max_depth=3)
    torch.testing.assert_close(longer.logits_BTV, model(tokens).logits_BTV)


@pytest.mark.parametrize("make", cases("pairs", with_final=True))
def test_further_recursions_decode_as_they_read(make):
    """Token by token with a cache, and in one piece: the same depths and logits."""
    model, tokens = make(), random_tokens(2, 11)
    router = RepeatLastRouter(model.router, 5)
    whole = model(tokens, router=router)
    cache = KVCache(model.config, 2, num_recursions=5)
    parts = [model(t, router=router, cache=cache) for t in tokens.split([4, *[1] * 7], dim=1)]
    logits = torch.cat([part.logits_BTV for part in parts], dim=1)
    torch.testing.assert_close(logits, whole.logits_BTV, atol=1e-4, rtol=1e-4)
    depths = torch.cat([part.routing.depth_BT for part in parts], dim=1)
    assert torch.equal(depths, whole.routing.depth_BT)


def test_further_recursions_decide_as_the_last_trained_one():
    """A fixed router repeats everyone; token-choice keeps going those that chose the last depth."""
    tokens = random_tokens(2, 11)

    def depths(model, router=None):
        return model(tokens, router=router).routing.depth_BT

    fixed, model = tiny("fixed"), tiny("token_choice")
    assert depths(fixed, RepeatLastRouter(fixed.router, 5)).eq(5).all()
    chosen, longer = depths(model), depths(model, RepeatLastRouter(model.router, 5))
    assert (chosen == 3).any() and torch.equal(longer, torch.where(chosen == 3, 5, chosen))


def test_what_cannot_be_extended_says_so():
    with pytest.raises(ValueError, match="nothing to extend"):
        RepeatLastRouter(tiny("fixed", num_recursions=1).router, 3)
    with pytest.raises(ValueError, match="max_depth=2"):
        RepeatLastRouter(tiny(RouterConfig(kind="expert_choice")).router, 2)


def all_to(depth, recursions, tokens):
    return (torch.arange(recursions) < depth)[:, None].expand(-1, tokens)


@pytest.mark.parametrize("kind", ["fixed", "expert_choice", "token_choice", "random"])
def test_a_forced_depth_under_a_cap_is_the_capped_depth(kind):
    model, tokens = tiny(kind), random_tokens(2, 9)
    two, three = (ForcedRouter(model.router, all_to(depth, 3, 18)) for depth in (2, 3))
    capped = model(tokens, router=three, max_depth=2)
    assert torch.equal(capped.logits_BTV, model(tokens, router=two).logits_BTV)
    assert capped.routing.depth_BT.eq(2).all()


@pytest.mark.parametrize("kind", ["expert_choice", "token_choice", "random"])
def test_routers_around_routers_answer_as_one(kind):
    """Forced depths of a router that goes on are those of a router that goes on when forced."""
    model, tokens = tiny(kind), random_tokens(2, 9)
    table = all_to(5, 5, 18).clone()
    table[3:, ::2] = False
    outer = ForcedRouter(RepeatLastRouter(model.router, 5), table)
    output = model(tokens, router=outer)
    assert torch.equal(output.routing.taken_RM, table)
    assert outer.is_learned == model.router.is_learned
    assert outer.threshold(4) == model.router.threshold(2)
    depth = outer.chosen_depth(output.routing.memory)
    assert (depth is None) == (kind != "token_choice")
    assert depth is None or torch.equal(depth, table.sum(0))


def test_a_table_of_another_shape_is_refused():
    model, tokens = tiny("expert_choice"), random_tokens(2, 9)
    for shape in ((3, 7), (2, 18)):
        forced = ForcedRouter(model.router, torch.ones(shape, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"needs shape \(3, 18\)"):
            model(tokens, router=forced)


@pytest.mark.parametrize("kv", ["shared", "hybrid"])
def test_strategies_that_read_the_first_recursion_need_every_token_there(kv):
    model, tokens = tiny("random", kv_strategy=kv), random_tokens(2, 9)
    table = torch.ones(3, 18, dtype=torch.bool)
    table[:, 1] = False
    with pytest.raises(ValueError, match=f"kv_strategy='{kv}' reads the first recursion's keys"):
        model(tokens, router=ForcedRouter(model.router, table))
    with pytest.raises(ValueError, match="the first capacity must be 1"):
        model(tokens, selection="topk", capacities=(0.5, 0.5, 0.3))
    own = tiny("random", kv_strategy="recursion_wise")
    depth_BT = own(tokens, router=ForcedRouter(own.router, table)).routing.depth_BT
    assert depth_BT[0].tolist() == [3, 0, 3, 3, 3, 3, 3, 3, 3]


def test_capacities_out_of_range_are_refused():
    model = tiny(RouterConfig(kind="expert_choice"))
    for capacities in ((2, 1, 1), (1, -0.5, 0.1), (1, float("nan"), 0.1), (1, 0, 0)):
        with pytest.raises(ValueError, match=r"router\.capacities\[\d\] must be"):
            model(random_tokens(1, 6), selection="topk", capacities=capacities)


def test_a_cache_for_fewer_recursions_says_how_many_it_needs():
    model, tokens = tiny("expert_choice"), random_tokens(2, 9)
    router = RepeatLastRouter(model.router, 5)
    with pytest.raises(ValueError, match="num_recursions=4 or more"):
        model(tokens, router=router, cache=KVCache(model.config, 2))


def test_targets_of_another_shape_are_refused():
    model = tiny("fixed")
    for shape in ((2, 5), (1, 20)):
        with pytest.raises(ValueError, match=r"targets have shape .* they must be equal"):
            model(random_tokens(2, 10), targets_BT=random_tokens(*shape))


def test_nobody_comes_back_who_is_seen_as_he_left():
    model, tokens = tiny("expert_choice", kv_strategy="final"), random_tokens(1, 2)
    for taken in ([[1, 1], [1, 0], [1, 0]], [[1, 1], [1, 1], [0, 0]]):
        model(tokens, router=ForcedRouter(model.router, torch.tensor(taken).bool()))
    back = ForcedRouter(model.router, torch.tensor([[1, 1], [1, 0], [1, 1]]).bool())
    with pytest.raises(ValueError, match="must not take a later one"):
        model(tokens, router=back)
    with pytest.raises(ValueError, match="none may come back"):
        tiny(RouterConfig(kind="expert_choice", hierarchical=False), kv_strategy="final")
