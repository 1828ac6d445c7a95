"""Exits: what tokens would predict after each recursion, and what routers learn from it."""

import pytest
import torch
import torch.nn.functional as F

from mor.model.config import RouterConfig
from tests.conftest import random_tokens, tiny

GAIN = RouterConfig(kind="expert_choice", causal_selection="gain", gate="residual", alpha=1.0)
EVERYONE = (1.0, 1.0, 1.0)


def with_exits(model, tokens, targets, rows):
    return model(tokens, targets_BT=targets, selection="topk", capacities=EVERYONE, exit_rows=rows)


@pytest.mark.parametrize("kv", ["recursion_wise", "final"])
def test_an_exit_predicts_what_a_model_of_that_depth_does(kv):
    model, tokens, targets = tiny(GAIN, kv_strategy=kv), random_tokens(3, 9), random_tokens(3, 9)
    targets[1, :4] = -100
    exits = with_exits(model, tokens, targets, 2).routing.exits
    asked = targets[:2].flatten() != -100
    assert exits.index.tolist() == asked.nonzero().squeeze(1).tolist()
    for depth in (1, 2, 3):
        whole = model(tokens, max_depth=depth, selection="topk", capacities=EVERYONE)
        logits = whole.logits_BTV[:2].flatten(0, 1)[asked]
        nll = F.cross_entropy(logits, targets[:2].flatten()[asked], reduction="none")
        assert (exits.nll_RK[depth - 1] - nll).abs().max() < 1e-5


def test_exits_change_nothing_else():
    model, tokens, targets = tiny(GAIN), random_tokens(3, 9), random_tokens(3, 9)
    plain = model(tokens, targets_BT=targets, selection="topk", capacities=EVERYONE)
    assert torch.equal(with_exits(model, tokens, targets, 2).nll, plain.nll)


def test_the_second_network_learns_what_going_on_gains():
    """Its logits against the nats up to the best later depth, cut at 1; nothing else in the model
    decides who goes in, and the gate is not touched."""
    model, tokens, targets = tiny(GAIN), random_tokens(3, 9), random_tokens(3, 9)
    routing = with_exits(model, tokens, targets, 2).routing
    nll, expected = routing.exits.nll_RK.detach(), []
    for r in (1, 2):
        gain = torch.stack([nll[r - 1] - nll[d] for d in range(r, 3)]).amax(0).clamp(0, 1)
        assert 0 < gain.mean() < 1
        logit = routing.steps[r].decision.causal_logit[routing.exits.index]
        expected.append(F.binary_cross_entropy_with_logits(logit, gain))
    loss = routing.losses["gain"]
    assert loss.weight == 0.1 and (loss.value - sum(expected) / 2).abs() < 1e-6
    loss.value.backward()
    router = model.router
    assert all(net.weight.grad.abs().sum() > 0 for net in list(router.aux_nets)[1:])
    # Of the gates, those before the exits that it compares: the state it looks at.
    assert router.nets[2].weight.grad is None

    sparse = model(tokens, selection="topk")
    last = sparse.routing.steps[1].decision
    assert torch.equal(last.rank, last.causal_logit) and not torch.equal(last.rank, last.logit)
    assert float(sparse.routing.losses["gain"].value) == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(capacities=EVERYONE, exit_rows=1), "exits need targets"),
        (dict(targets_BT=random_tokens(2, 5), exit_rows=1), "capacities of 1"),
    ],
)
def test_exits_need_targets_and_full_depth(settings, reason):
    with pytest.raises(ValueError, match=reason):
        tiny(GAIN)(random_tokens(2, 5), selection="topk", **settings)
