"""Selection, balancing and the routing record."""

import pytest
import torch
from conftest import random_tokens, tiny

from mor.model.config import RouterConfig
from mor.model.packing import pack
from mor.model.random import hash_uniform


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


def test_hash_uniform_is_uniform_and_stateless():
    draws = hash_uniform(3, torch.arange(100_000))
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5e-3 and abs(draws.var() - 1 / 12) < 2e-3
    assert torch.equal(draws[77], hash_uniform(3, 77))
    assert abs(torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1]) < 0.01
    assert (
        abs(torch.corrcoef(torch.stack([draws, hash_uniform(4, torch.arange(100_000))]))[0, 1])
        < 0.01
    )


def test_packing_round_trip_with_holes_and_empty_rows():
    tokens = random_tokens(4, 6)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0] * 6, [1] * 6, [0, 0, 0, 0, 0, 1]]).bool()
    packed = pack(tokens, mask)
    assert packed.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 0]
    assert packed.rows.tolist() == [0, 2, 3]
    padded = packed.pad(packed.ids, fill=-1)
    assert padded.shape == (3, 6) and padded[2].tolist() == [int(tokens[3, 5]), *[-1] * 5]
    assert torch.equal(packed.unpad(padded), packed.ids)
    assert torch.equal(packed.unpack(packed.ids, fill=-1), tokens.masked_fill(~mask, -1))
    assert torch.equal(
        packed.ids[packed.last_index()], torch.stack([tokens[0, 3], tokens[2, 5], tokens[3, 5]])
    )
    with pytest.raises(ValueError, match="must be equal"):
        pack(tokens, mask[:, :3])


def test_bad_input_to_the_model_is_refused():
    model = tiny("fixed")
    with pytest.raises(ValueError, match="not be empty"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="hides every token"):
        model(random_tokens(1, 3), mask_BT=torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="choose 'topk' or 'threshold'"):
        model(random_tokens(1, 3), selection="best")
    with pytest.raises(ValueError, match="1 capacities for 3 recursions"):
        model(random_tokens(1, 3), capacities=(1.0,))


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
