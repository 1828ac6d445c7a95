"""Rules that choose in place of a learned router."""

import pytest
import torch

from mor.evaluation.calibrate import fit_table
from mor.evaluation.choosers import (
    ConfidenceRouter,
    by_need,
    check_can_choose,
    doubt,
    need_of,
)
from mor.evaluation.nll import evaluate
from mor.model.budget import EVERYONE, NOBODY
from mor.model.packing import pack
from tests.budgets import GAIN, text
from tests.conftest import random_tokens, tiny

SHARES = [1.0, 0.7, 0.35, 0.1]
NEEDS = ("random", "position", "frequency")


def model(**settings):
    return tiny(GAIN, kv_strategy="final", **settings)


def batch(tokens=1600, seed=0):
    data = text(tokens, seed=seed)
    return data.batch(data.spread(25), 25)


def confident(of, *thresholds):
    return ConfidenceRouter(of, torch.tensor([[EVERYONE, *thresholds]]))


@pytest.mark.parametrize("chooser", NEEDS)
def test_shares_are_those_asked_for_on_other_text_and_those_who_need_it_most_go(chooser):
    found, counts = model(), torch.bincount(random_tokens(3000, seed=3), minlength=37)
    router = by_need(found, need_of(chooser, counts), SHARES, batch())
    measured = evaluate(found, text(3000, seed=1), seq_len=25, router=router)
    assert measured.share_per_recursion == pytest.approx(SHARES, abs=0.04)
    tokens = random_tokens(50).view(2, 25)
    need = need_of(chooser, counts)(pack(tokens))
    depth = found(tokens, router=router).routing.depth
    assert len(set(depth.tolist())) == 4, "or the next line could not fail"
    for shallow in range(1, 4):
        assert need[depth <= shallow].max() < need[depth > shallow].min()


def test_rare_tokens_go_first_and_ties_are_spread():
    counts = torch.tensor([60, 10, 30])
    need = need_of("frequency", counts)(pack(torch.tensor([[0, 1, 2, 0, 1, 2, 0, 0]])))
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    for token, (low, high) in enumerate(((0.0, 0.6), (0.9, 1.0), (0.6, 0.9))):
        own = need[ids == token]
        assert (own >= low).all() and (own < high).all() and len(own.unique()) == len(own)


def test_gates_and_states_are_those_of_the_model():
    """Where everyone goes everywhere there is nothing to choose."""
    found, tokens = model(), random_tokens(50).view(2, 25)
    router = by_need(found, need_of("random", torch.ones(37)), [1.0] * 3, batch())
    logits = [
        found(tokens, router=each).logits_BTV for each in (router, confident(found, *[-99] * 2))
    ]
    full = found(tokens, capacities=[1.0] * 3).logits_BTV
    for each in logits:
        torch.testing.assert_close(each, full)


def test_doubt_is_of_what_the_model_would_predict_there():
    """The odds of a model whose tokens all leave after the first recursion."""
    found, tokens = model(), random_tokens(50).view(2, 25)
    output = found(tokens, max_depth=1, keep_states=True)
    best = output.logits_BTV.flatten(0, 1).softmax(-1).amax(-1)
    expected = ((1 - best) / best).log()
    torch.testing.assert_close(
        doubt(found, output.routing.states[1], output.routing.tokens), expected
    )


def test_unsure_tokens_go_on_and_nobody_returns():
    found, tokens = model(), random_tokens(50).view(2, 25)
    first = found(tokens, max_depth=1, keep_states=True).routing
    unsure = doubt(found, first.states[1], first.tokens).detach()
    middle = float(unsure.median())
    routing = found(tokens, router=confident(found, middle, EVERYONE)).routing
    assert torch.equal(routing.depth, torch.where(unsure >= middle, 3, 1)), "none comes back"
    assert found(tokens, router=confident(found, NOBODY, EVERYONE)).routing.depth.max() == 1


def test_confidence_is_causal():
    found, tokens = model(), random_tokens(50).view(2, 25)
    first = found(tokens, max_depth=1, keep_states=True).routing
    limit = float(doubt(found, first.states[1], first.tokens).detach().median())
    router = confident(found, limit, limit - 0.05, limit - 0.05)
    before = found(tokens, router=router)
    changed = tokens.clone()
    changed[:, 17:] = (changed[:, 17:] + 5) % 37
    after = found(changed, router=router)
    assert len(set(before.routing.depth.tolist())) > 1
    assert torch.equal(before.routing.depth_BT[:, :17], after.routing.depth_BT[:, :17])
    torch.testing.assert_close(before.logits_BTV[:, :17], after.logits_BTV[:, :17])
    assert not torch.equal(before.logits_BTV[:, 17:], after.logits_BTV[:, 17:])


def test_a_mean_depth_of_confidence_holds_on_other_text():
    found = model()
    table = fit_table(found, batch(800), 3, deciding=lambda row: ConfidenceRouter(found, row))
    for depth in (1.5, 2.5):
        router = confident(found, *table.at(depth))
        measured = evaluate(found, text(800, seed=1), seq_len=25, router=router)
        assert measured.mean_depth == pytest.approx(depth, rel=0.08)


@pytest.mark.parametrize("kind", ["fixed", "random", "token_choice"])
def test_there_must_be_a_choice_at_each_recursion_to_replace(kind):
    with pytest.raises(ValueError, match=f"this one is {kind}"):
        check_can_choose(tiny(kind).config)
