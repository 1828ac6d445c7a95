"""Forced depths: every token at every depth, all at once, equals one whole run each."""

import pytest
import torch
from conftest import cases, random_tokens, tiny

from mor.analysis.branches import at_depth, exits, exits_plain, taken
from mor.analysis.views import StateRecorder, TableRouter, extended, with_router
from mor.model.config import RouterConfig
from mor.model.kv_cache import KVCache


def read(model, ids):
    cache = KVCache(model.config, 1)
    return model(torch.tensor([ids]), cache=cache), cache


@pytest.mark.parametrize("make", cases())
def test_all_counterfactuals_at_once_equal_one_run_of_the_whole_sequence_each(make, monkeypatch):
    model, ids = make(), random_tokens(13, seed=4).tolist()
    with torch.no_grad():
        output, cache = read(model, ids)
    taken_RM = taken(output.routing)
    monkeypatch.setattr("mor.analysis.branches.CHUNK_LOGITS", 5 * 37)  # chunks of 5, 5 and 3 tokens
    changed = False
    for depth in range(1, model.config.num_recursions + 1):
        fast = torch.cat(list(exits(model, ids, taken_RM, depth, cache)))
        torch.testing.assert_close(
            fast, exits_plain(model, ids, taken_RM, depth), atol=1e-4, rtol=1e-4
        )
        same_M = (at_depth(taken_RM, depth) == taken_RM).all(0)
        torch.testing.assert_close(fast[same_M], output.logits_BTV[0][same_M], atol=1e-4, rtol=1e-4)
        changed |= bool((fast[~same_M] - output.logits_BTV[0][~same_M]).abs().gt(1e-2).any())
    assert changed, "another depth changes the prediction"
    assert cache.length_B.tolist() == [13]


@pytest.mark.parametrize("make", cases())
def test_a_table_of_the_routers_own_decisions_changes_nothing(make):
    model, tokens = make(), random_tokens(2, 11)
    output = model(tokens)
    view = with_router(model, TableRouter(model.recursions.router, taken(output.routing)))
    again = view(tokens)
    torch.testing.assert_close(again.logits_BTV, output.logits_BTV, atol=1e-5, rtol=1e-5)
    assert torch.equal(again.routing.depth_BT, output.routing.depth_BT)


def test_depth_takes_the_recursions_that_a_token_took_first():
    taken_RM = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 0, 0]]).bool()
    assert at_depth(taken_RM, 2).int().tolist() == [[1, 1, 1], [0, 1, 1], [1, 0, 0]]
    assert torch.equal(at_depth(taken_RM, 3), torch.ones(3, 3, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["fixed", "expert_choice", "token_choice", "random"])
def test_recorded_states_are_those_the_model_went_through(kind):
    model, tokens, seen = tiny(kind), random_tokens(1, 11), []
    recorder = StateRecorder(model.recursions.router)
    view = with_router(model, recorder)
    view.recursions.register_forward_hook(lambda module, inputs, out: seen.extend([inputs[0], out]))
    torch.testing.assert_close(view(tokens).logits_BTV, model(tokens).logits_BTV)
    assert len(recorder.states_MD) == 4
    assert torch.equal(recorder.states_MD[0], seen[0]) and torch.equal(
        recorder.states_MD[-1], seen[1]
    )
    for r in range(3):
        moved_M = (recorder.states_MD[r] != recorder.states_MD[r + 1]).any(1)
        assert torch.equal(moved_M, model(tokens).routing.selected_M(r))


@pytest.mark.parametrize("make", cases())
def test_an_extended_model_capped_at_its_trained_depth_is_the_model(make):
    model, tokens = make(), random_tokens(2, 11)
    longer = extended(model, 5)
    torch.testing.assert_close(longer(tokens, max_depth=3).logits_BTV, model(tokens).logits_BTV)
    assert {id(p) for p in longer.parameters()} == {id(p) for p in model.parameters()}, (
        "no weight is copied"
    )


def test_further_recursions_decide_as_the_last_trained_one():
    """A fixed router repeats everyone; token-choice keeps going those that chose the last depth."""
    tokens = random_tokens(2, 11)
    assert extended(tiny("fixed"), 5)(tokens).routing.depth_BT.eq(5).all()
    model = tiny("token_choice")
    chosen, longer = model(tokens).routing.depth_BT, extended(model, 5)(tokens).routing.depth_BT
    assert (chosen == 3).any() and torch.equal(longer, torch.where(chosen == 3, 5, chosen))


def test_what_cannot_be_extended_says_so():
    with pytest.raises(ValueError, match="nothing to extend"):
        extended(tiny("fixed", num_recursions=1), 3)
    with pytest.raises(ValueError, match="max_depth=2"):
        extended(tiny(RouterConfig(kind="expert_choice")), 2)
