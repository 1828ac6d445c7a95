"""Routers that send tokens to other depths than the trained one would."""

import pytest
import torch

from mor.model.config import RouterConfig
from mor.model.kv_cache import KVCache
from mor.model.other_depths import ForcedRouter, RepeatLastRouter
from tests.conftest import cases, random_tokens, tiny


@pytest.mark.parametrize("make", cases("pairs"))
def test_a_table_of_the_routers_own_decisions_changes_nothing(make):
    model, tokens = make(), random_tokens(2, 11)
    output = model(tokens)
    again = model(tokens, router=ForcedRouter(model.router, output.routing.taken_RM))
    torch.testing.assert_close(again.logits_BTV, output.logits_BTV, atol=1e-5, rtol=1e-5)
    assert torch.equal(again.routing.depth_BT, output.routing.depth_BT)


@pytest.mark.parametrize("make", cases("pairs"))
def test_further_recursions_capped_at_the_trained_depth_change_nothing(make):
    model, tokens = make(), random_tokens(2, 11)
    longer = model(tokens, router=RepeatLastRouter(model.router, 5), max_depth=3)
    torch.testing.assert_close(longer.logits_BTV, model(tokens).logits_BTV)


@pytest.mark.parametrize("make", cases("pairs"))
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
