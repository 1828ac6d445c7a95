"""What each router decides by, its losses and its health."""

import copy
import math
import pickle

import pytest
import torch

from mor.model.config import RouterConfig
from mor.model.other_depths import RepeatLastRouter
from mor.model.random import hash_uniform
from tests.conftest import random_tokens, tiny


def test_thresholds_are_state_and_move_the_depth():
    model = tiny("expert_choice")
    tokens = random_tokens(2, 15)
    assert "recursions.router.threshold_R" in model.state_dict()
    assert model.router.threshold_R.tolist() == [0.5] * 3
    depths = []
    for limit in (0.0, 0.5, 1.0):
        model.router.threshold_R.fill_(limit)
        depths.append(model(tokens).routing.depth_BT.float().mean().item())
    assert depths[0] == 3 and depths[2] == 1 and 1 < depths[1] < 3


def test_the_auxiliary_router_decides_alone_at_inference_and_sends_no_gradient_back():
    model = tiny(RouterConfig(kind="expert_choice", causal_selection="aux_router"))
    tokens = random_tokens(2, 12)
    before = model(tokens, selection="topk").routing.depth_BT, model(tokens).routing.depth_BT
    with torch.no_grad():
        for net in model.router.aux_nets:
            net.weight.neg_()
    after = model(tokens, selection="topk").routing.depth_BT, model(tokens).routing.depth_BT
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    model(tokens, selection="topk").routing.losses["selection"].value.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {f"recursions.router.aux_nets.{r}.weight" for r in range(3)}


def test_loss_free_bias_moves_towards_balance_and_only_selects():
    model = tiny(RouterConfig(kind="token_choice", balancing="loss_free", bias_update_rate=0.01))
    router = model.router
    router.update_bias(torch.tensor([10, 1, 4]))
    assert torch.allclose(router.bias_R, torch.tensor([-0.01, 0.01, 0.01]))
    router.bias_R.copy_(torch.tensor([0.0, 0.0, 5.0]))
    routing = model(random_tokens(1, 8)).routing
    assert (routing.depth_BT == 3).all()
    assert routing.gate_BT(2).max() <= 1, "the bias must not enter the gate"
    assert "balancing" not in routing.losses


def test_balanced_choices_give_a_balancing_loss_of_one():
    model = tiny("token_choice")
    with torch.no_grad():
        model.router.net.weight.zero_()
    loss = model(random_tokens(1, 8)).routing.losses["balancing"]
    assert abs(loss.value - 1) < 1e-6 and loss.weight == 0.1


def test_the_random_router_meets_its_capacities_and_depends_on_its_seed():
    model, other = tiny("random"), tiny(RouterConfig(kind="random", seed=1))
    tokens = random_tokens(8, 60)
    routing = model(tokens).routing
    shares = [count / tokens.numel() for count in routing.tokens_per_recursion()]
    assert shares[0] == 1 and abs(shares[1] - 2 / 3) < 0.08 and abs(shares[2] - 1 / 3) < 0.08
    assert not torch.equal(routing.depth_BT, other(tokens).routing.depth_BT)
    exact = model(tokens, selection="topk").routing.tokens_per_recursion()
    assert exact == [480, 320, 160]


def test_the_position_router_spreads_depth_over_positions_and_looks_at_nothing_else():
    model = tiny("position")
    routing = model(random_tokens(3, 60)).routing
    assert (routing.depth_BT == routing.depth_BT[:1]).all() and torch.equal(
        routing.depth_BT, model(random_tokens(3, 60, seed=9)).routing.depth_BT
    )
    shares = [count / 180 for count in routing.tokens_per_recursion()]
    assert shares[0] == 1 and abs(shares[1] - 2 / 3) < 0.03 and abs(shares[2] - 1 / 3) < 0.03


def test_the_frequency_router_sends_rare_tokens_deeper_and_meets_its_capacities():
    model = tiny("frequency")
    count = torch.arange(1, 38).flip(0)  # token 36 is the rarest
    model.router.fit(count)
    tokens = torch.repeat_interleave(torch.arange(37), count)[
        None, hash_uniform(0, torch.arange(703)).argsort()
    ]
    routing = model.double()(tokens[:, :64].expand(2, -1)).routing
    order = tokens[0, :64].argsort()
    assert (routing.depth_BT[0][order].diff() >= 0).all() and len(
        set(routing.depth_BT[0].tolist())
    ) == 3
    need_V = model.router.need_V
    for capacity in (2 / 3, 1 / 3):
        taken = count[need_V >= 1 - capacity].sum() / count.sum()
        assert abs(taken - capacity) < 0.05


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_routers_and_losses_stay_fp32_under_autocast(router):
    """bf16 holds 8 bits: tokens that rank apart in fp32 would tie."""
    model, tokens = tiny(router), random_tokens(4, 60)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens, targets_BT=tokens, selection="topk")
        inside = model.prelude[0].feed_forward(torch.randn(2, 24))
    logits = output.routing.steps[0].decision.logit
    assert inside.dtype == torch.bfloat16, "the layers do run in bf16"
    assert logits.dtype == output.nll.dtype == output.routing.weighted_loss.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    output.nll.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_router_health_by_hand():
    model = tiny("expert_choice", num_recursions=3)
    routing = model(random_tokens(2, 12), selection="topk").routing
    found = model.router.health([routing])
    assert found["mean_depth"] == pytest.approx(2.0) and found[
        "share_per_recursion"
    ] == pytest.approx([1, 2 / 3, 1 / 3])
    assert found["depth_entropy"] == pytest.approx(1.0), "a third of the tokens at each depth"
    gates = [0.1 * step.decision.logit[step.chosen].sigmoid().detach() for step in routing.steps]
    assert found["gate_per_recursion"] == pytest.approx([float(each.mean()) for each in gates])
    last = routing.selected_BT(2)
    assert found["dead_positions"] == pytest.approx(
        sum(not (last[0, t] or last[1, t]) for t in range(12)) / 12
    )
    same = [
        bool(routing.selected_BT(r)[b, t]) == bool(routing.logit_BT(r)[b, t] > 0)
        for r in (1, 2)
        for b in range(2)
        for t in range(12)
        if not routing.logit_BT(r)[b, t].isnan()
    ]
    assert found["agreement"] == pytest.approx(sum(same) / len(same))
    chosen = tiny("token_choice", num_recursions=3)
    routing = chosen(random_tokens(2, 12), selection="topk").routing
    load = torch.bincount(routing.depth - 1, minlength=3) / 24
    assert chosen.router.health([routing])["max_violation"] == pytest.approx(
        3 * load.max().item() - 1
    )
    plain = tiny("fixed", num_recursions=3)
    assert plain.router.health([plain(random_tokens(2, 5)).routing]).keys() == {
        "mean_depth",
        "share_per_recursion",
    }


def test_the_entropy_of_depths_counts_tokens_that_take_no_recursion():
    model = tiny(RouterConfig(kind="random", capacities=(0.75, 0.5, 0.25)))
    routing = model(random_tokens(4, 60)).routing
    share = torch.bincount(routing.depth, minlength=4) / 240
    expected = float(torch.special.entr(share).sum()) / math.log(4)
    found = model.router.health([routing])
    assert found["depth_entropy"] == pytest.approx(expected, abs=1e-6) and expected > 0.95
    assert found["mean_depth"] == pytest.approx(float(routing.depth.double().mean()))


@pytest.mark.parametrize("gate", ["paper", "residual"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(kind="expert_choice", score="none"),
        dict(kind="token_choice"),
        dict(kind="random"),
        dict(kind="frequency"),
    ],
)
def test_a_copy_and_a_pickle_give_the_same_logits(settings, gate):
    model, tokens = tiny(RouterConfig(**settings, gate=gate)), random_tokens(2, 9)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens).logits_BTV, model(tokens).logits_BTV)


@torch.no_grad()
@pytest.mark.parametrize("recursions", [1, 2, 5])
def test_health_of_steps_with_other_recursions_than_the_models_own(recursions):
    model = tiny("expert_choice")
    router = RepeatLastRouter(model.router, recursions) if recursions > 3 else None
    everyone = dict(selection="topk", capacities=(1.0,) * 3, max_depth=recursions)
    routing = model(random_tokens(2, 9), router=router, **everyone).routing
    health = model.router.health([routing])
    assert health["share_per_recursion"] == [1] * recursions
    assert health["mean_depth"] == recursions
    assert health["depth_entropy"] == health["dead_positions"] == 0
