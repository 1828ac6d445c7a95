"""Other routers given to a forward: what does not fit is refused, nesting keeps every answer."""

import pytest
import torch
from conftest import cases, random_tokens, tiny

from mor.model.config import RouterConfig
from mor.model.kv_cache import KVCache
from mor.model.other_depths import ForcedRouter, RepeatLastRouter


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
    with pytest.raises(ValueError, match="every token must take it"):
        model(tokens, selection="topk", capacities=(0.5, 0.5, 0.3))
    own = tiny("random", kv_strategy="recursion_wise")
    depth_BT = own(tokens, router=ForcedRouter(own.router, table)).routing.depth_BT
    assert depth_BT[0].tolist() == [3, 0, 3, 3, 3, 3, 3, 3, 3]


def test_capacities_out_of_range_are_refused():
    model = tiny(RouterConfig(kind="expert_choice"))
    for capacities in ((2, 1, 1), (1, -0.5, 0.1), (1, float("nan"), 0.1), (1, 0, 0)):
        with pytest.raises(ValueError, match=r"capacities must lie in \(0, 1\]"):
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


@pytest.mark.parametrize("make", cases())
def test_forcing_what_the_router_decides_changes_nothing(make):
    model, tokens = make(), random_tokens(2, 7)
    own = model(tokens)
    forced = model(tokens, router=ForcedRouter(model.router, own.routing.taken_RM))
    torch.testing.assert_close(forced.logits_BTV, own.logits_BTV, atol=1e-5, rtol=1e-5)
