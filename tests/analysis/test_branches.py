"""Forced depths: every token at every depth, all at once, equals one whole run each."""

import pytest
import torch

from mor.analysis.branches import at_depth, exits, exits_plain
from mor.model.budget import router_for
from mor.model.kv_cache import KVCache
from tests.budgets import calibrated
from tests.conftest import cases, random_tokens, some, tiny


def read(model, ids):
    cache = KVCache(model.config, 1)
    return model(torch.tensor([ids]), cache=cache), cache


@pytest.mark.parametrize("make", some(cases("singles", with_final=True), 3))
def test_all_counterfactuals_at_once_equal_one_run_of_the_whole_sequence_each(make, monkeypatch):
    model, ids = make(), random_tokens(13, seed=4).tolist()
    with torch.no_grad():
        output, cache = read(model, ids)
    taken_RM = output.routing.taken_RM
    monkeypatch.setattr("mor.analysis.branches.CHUNK_LOGITS", 5 * 37)  # chunks of 5, 5 and 3 tokens
    changed = False
    for depth in range(model.config.least_depth, model.config.num_recursions + 1):
        fast = torch.cat(list(exits(model, ids, taken_RM, depth, cache)))
        torch.testing.assert_close(
            fast, exits_plain(model, ids, taken_RM, depth), atol=1e-4, rtol=1e-4
        )
        same = (at_depth(taken_RM, depth) == taken_RM).all(0)
        torch.testing.assert_close(fast[same], output.logits_BTV[0][same], atol=1e-4, rtol=1e-4)
        changed |= bool((fast[~same] - output.logits_BTV[0][~same]).abs().gt(1e-2).any())
    assert changed, "another depth changes the prediction"
    assert cache.length.tolist() == [13]


@pytest.mark.parametrize("depth", [None, 1.7, 4.2])
def test_so_they_do_beyond_the_trained_recursions_where_tokens_are_seen_as_they_left(depth):
    model, ids = calibrated("expert", "final"), random_tokens(9, seed=2).tolist()
    router = router_for(model, depth, at_least=3)
    cache = KVCache(model.config, 1, num_recursions=router.num_recursions)
    with torch.no_grad():
        taken_RM = model(torch.tensor([ids]), cache=cache, router=router).routing.taken_RM
    assert len(taken_RM) == (5 if depth == 4.2 else 3)
    for each in range(1, len(taken_RM) + 1):
        fast = torch.cat(list(exits(model, ids, taken_RM, each, cache, router=router)))
        plain = exits_plain(model, ids, taken_RM, each, router=router)
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


def test_depth_takes_the_recursions_that_a_token_took_first():
    taken_RM = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 0, 0]]).bool()
    assert at_depth(taken_RM, 2).int().tolist() == [[1, 1, 1], [0, 1, 1], [1, 0, 0]]
    assert torch.equal(at_depth(taken_RM, 3), torch.ones(3, 3, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["fixed", "expert_choice", "token_choice", "random"])
def test_recorded_states_are_those_the_model_went_through(kind):
    model, tokens, seen = tiny(kind), random_tokens(1, 11), []
    model.recursions.register_forward_hook(
        lambda module, inputs, out: seen.extend([inputs[0], out[0]])
    )
    output = model(tokens, keep_states=True)
    torch.testing.assert_close(output.logits_BTV, model(tokens).logits_BTV)
    states, routing = output.routing.states, output.routing
    assert len(states) == 4 and not model(tokens).routing.states
    assert torch.equal(states[0], seen[0]) and torch.equal(states[-1], seen[1])
    for r in range(3):
        moved = (states[r] != states[r + 1]).any(1)
        assert torch.equal(moved, routing.selected(r))
