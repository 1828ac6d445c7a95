"""Selection, capacities and the routing record."""

import pytest
import torch

from mor.model.config import RouterConfig
from tests.conftest import random_tokens, tiny


def test_capacities_refer_to_the_full_length_and_selection_is_nested():
    model = tiny("expert_choice")
    routing = model(random_tokens(2, 13), selection="topk").routing
    for row in range(2):
        assert [int(routing.selected_BT(r)[row].sum()) for r in range(3)] == [13, 8, 4]
    assert (routing.selected_BT(2) <= routing.selected_BT(1)).all()
    assert torch.equal(routing.depth_BT, sum(routing.selected_BT(r).long() for r in range(3)))


def test_topk_keeps_the_best_scores_of_the_candidates():
    model = tiny("expert_choice")
    routing = model(random_tokens(1, 12), selection="topk").routing
    for r in (1, 2):
        logit, chosen = routing.logit_BT(r)[0], routing.selected_BT(r)[0]
        assert torch.equal(~logit.isnan(), routing.selected_BT(r - 1)[0])
        assert logit[chosen].min() >= logit[~chosen & ~logit.isnan()].max()
        gate = routing.gate_BT(r)[0]
        assert torch.equal(gate.isnan(), ~chosen)
        assert torch.allclose(gate[chosen], 0.1 * logit[chosen].sigmoid())


def test_flat_selection_lets_every_token_compete_again():
    model = tiny(RouterConfig(kind="expert_choice", hierarchical=False))
    routing = model(random_tokens(4, 12), selection="topk").routing
    assert (routing.selected_BT(2) & ~routing.selected_BT(1)).any()
    assert not routing.logit_BT(2).isnan().any()


def test_a_recursion_of_capacity_one_keeps_every_token_in_both_modes():
    model = tiny(RouterConfig(kind="expert_choice", capacities=(1.0, 1.0, 0.5)))
    with torch.no_grad():
        for net in model.router.nets:
            net.weight.fill_(0.0)
            net.weight[:, 0] = -100.0
    for selection in ("topk", "threshold"):
        routing = model(random_tokens(2, 9), selection=selection).routing
        assert routing.selected_BT(0).all() and routing.selected_BT(1).all()


def test_capacity_warm_up_replaces_the_capacities():
    model = tiny("expert_choice")
    routing = model(random_tokens(1, 12), selection="topk", capacities=(1.0, 1.0, 0.5)).routing
    assert routing.tokens_per_recursion() == [12, 12, 6]


def test_max_depth_leaves_the_later_recursions_out():
    for kind in ("fixed", "expert_choice", "token_choice", "random", "position", "frequency"):
        for cap in (1, 2, 3):
            routing = tiny(kind)(random_tokens(2, 20), max_depth=cap).routing
            assert routing.depth_BT.max() == cap and len(routing.steps) == cap
    with pytest.raises(ValueError, match=r"1\.\.3"):
        tiny("fixed")(random_tokens(1, 3), max_depth=4)


def test_forward_changes_no_state():
    for kind in ("expert_choice", "token_choice", "random", "position", "frequency"):
        model = tiny(
            RouterConfig(
                kind=kind, **({"balancing": "loss_free"} if kind == "token_choice" else {})
            )
        )
        before = {n: t.clone() for n, t in model.state_dict().items()}
        attributes = {id(m): set(vars(m)) for m in model.modules()}
        model(random_tokens(2, 9), selection="topk")
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert attributes == {id(m): set(vars(m)) for m in model.modules()}


def test_padding_is_no_token_and_a_token_without_recursions_is_one():
    model = tiny(RouterConfig(kind="random", capacities=(0.5, 0.3, 0.1)))
    tokens, mask = random_tokens(3, 9), torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4] = mask[1, 6:] = mask[2, 3] = False
    routing = model(tokens, mask_BT=mask).routing
    assert torch.equal(routing.mask_BT, mask)
    assert routing.depths_by_row() == [
        model(row[real][None]).routing.depth_BT[0].tolist()
        for row, real in zip(tokens, mask, strict=True)
    ]
    assert any(0 in depths for depths in routing.depths_by_row())


@pytest.mark.parametrize("kv", ["hybrid", "shared"])
@pytest.mark.parametrize("selection", ["topk", "threshold"])
def test_capacities_of_a_forward_are_held_to_what_the_settings_are(kv, selection):
    model, tokens = tiny("expert_choice", kv_strategy=kv), random_tokens(1, 9)
    for capacities, words in (
        ((0.5, 0.3, 0.1), "first capacity must be 1"),
        ((1.0, 0.2, 0.5), "must not grow"),
        ((1.0, 0.5), "2 entries for num_recursions=3"),
        ((1.0, 0.5, 0.0), "greater than 0"),
        ((1.0, 1.5, 0.5), "at most 1"),
    ):
        with pytest.raises(ValueError, match=words):
            model(tokens, capacities=capacities, selection=selection)
    warmed = model(tokens, capacities=[1.0, 1.0, 1.0], selection=selection).routing.depth_BT
    assert (warmed == 3).all()


@pytest.mark.filterwarnings("default")
def test_capacities_that_a_router_does_not_read_are_a_warning():
    with pytest.warns(UserWarning, match="capacities has no effect"):
        tiny("fixed")(random_tokens(1, 3), capacities=(1.0, 0.5, 0.2))
