"""The model as a whole: documents, recomputed activations, compiled layers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from mor.model.config import RouterConfig, preset
from mor.model.kv_cache import KVCache
from mor.model.transformer import Transformer
from tests.conftest import cases, random_tokens, tiny
from tests.waits import Waits

WARM_UP = [(1.0, 1.0, 1.0), (1.0, 0.9, 0.8), (1.0, 0.8, 0.6), (1.0, 2 / 3, 1 / 3)]


def gradients(model, tokens, capacities):
    model.zero_grad()
    output = model(tokens, targets_BT=tokens, selection="topk", capacities=capacities)
    (output.nll + output.routing.weighted_loss).backward()
    return [output.nll.detach()] + [
        p.grad.clone() for p in model.parameters() if p.grad is not None
    ]


@pytest.mark.parametrize("kv", ["recursion_wise", "shared"])
@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_no_graph_breaks_and_no_recompiling_in_the_capacity_warm_up(router, kv):
    """Graph breaks are errors (fullgraph); every graph compiled is counted."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model, plain = tiny(router, kv_strategy=kv), tiny(router, kv_strategy=kv)
    model.compile_blocks(backend=backend)
    counts = []
    for step, capacities in enumerate(WARM_UP if router == "expert_choice" else [None] * 4):
        tokens = random_tokens(2, 30, seed=step)
        found, expected = gradients(model, tokens, capacities), gradients(plain, tokens, capacities)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        counts.append(len(compiled))
    # also without keys; also after attention over ragged rows
    parts = 2 + (kv == "shared") + (router == "token_choice")
    assert counts == [parts] * 4, (
        "once each, in the first step, for all layers, recursions and capacities"
    )
    gradients(model, random_tokens(3, 41), None)
    assert len(compiled) == parts, "nor for another batch size or length"


@pytest.mark.parametrize(
    ("router", "kv", "expected"),
    [
        ("fixed", "recursion_wise", []),
        ("expert_choice", "recursion_wise", []),
        ("expert_choice", "shared", []),
        ("expert_choice", "hybrid", []),
        ("random", "recursion_wise", []),
        ("token_choice", "recursion_wise", ["nonzero", "tolist"]),
        ("token_choice", "shared", ["nonzero", "tolist"]),
    ],
)
def test_how_often_a_training_forward_waits_for_the_device(router, kv, expected):
    """Token-choice needs two shapes for each recursion after the first: how many tokens, and how
    many in each row."""
    model = tiny(RouterConfig(kind=router), kv_strategy=kv)
    tokens = random_tokens(2, 30)
    with Waits() as waits:
        model(tokens, targets_BT=tokens, selection="topk")
    assert waits.seen == expected * 2


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["recursion_wise", "shared"])
@pytest.mark.parametrize("router", ["fixed", "expert_choice", "token_choice"])
def test_compiled_bf16_training_on_a_gpu_stays_close_to_fp32_on_the_cpu(router, kv):
    plain = tiny(router, kv_strategy=kv, head_dim=16, dim=64)
    model = tiny(router, kv_strategy=kv, head_dim=16, dim=64).cuda().compile_blocks()
    tokens = random_tokens(2, 48)
    expected = plain(tokens, targets_BT=tokens, selection="topk").nll
    with torch.autocast("cuda", torch.bfloat16):
        output = model(tokens.cuda(), targets_BT=tokens.cuda(), selection="topk")
    assert output.nll.dtype == torch.float32
    torch.testing.assert_close(output.nll.cpu(), expected, atol=0.05, rtol=0.05)
    output.nll.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_init_weights_is_seeded_and_misses_nothing():
    config = preset(
        "tiny", num_recursions=2, router=RouterConfig(kind="expert_choice", architecture="mlp")
    )
    a, b, c = (
        Transformer(config).init_weights(1),
        Transformer(config).init_weights(1),
        Transformer(config).init_weights(2),
    )
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embedding.weight, c.embedding.weight)
    assert all((p == 1).all() for n, p in a.named_parameters() if "norm" in n)
    assert all(
        abs(p.std() - 0.02) < 4e-3 for p in a.parameters() if p.ndim == 2 and p.numel() > 500
    )
    a.recursions.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"recursions\.extra"):
        a.init_weights(0)


LENGTHS = [[5, 1, 9, 2], [17], [3, 3, 3, 8]]  # three lines of 17 tokens


def lines():
    tokens_BT = random_tokens(len(LENGTHS), 17)
    documents_BT = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]
    )
    return tokens_BT, documents_BT


def pieces():
    for line, row in enumerate(LENGTHS):
        start = 0
        for length in row:
            yield line, slice(start, start + length)
            start += length


@pytest.mark.parametrize("make", cases("pairs"))
@pytest.mark.parametrize("selection", ["threshold", "topk"])
def test_a_document_does_not_see_its_neighbours(make, selection):
    model = make()
    tokens_BT, documents_BT = lines()
    together = model(tokens_BT, documents_BT=documents_BT, selection=selection)
    for line, place in pieces():
        alone = model(tokens_BT[line : line + 1, place], selection=selection)
        torch.testing.assert_close(
            together.logits_BTV[line, place], alone.logits_BTV[0], atol=1e-5, rtol=1e-5
        )
        assert torch.equal(together.routing.depth_BT[line, place], alone.routing.depth_BT[0])
    apart = model(tokens_BT, selection=selection)
    assert not torch.allclose(together.logits_BTV, apart.logits_BTV, atol=1e-3), (
        "the documents do matter"
    )


@pytest.mark.parametrize(
    "router", ["fixed", "expert_choice", "token_choice", "random", "position", "frequency"]
)
def test_gradients_of_documents_are_the_sum_over_documents(router):
    model = tiny(router).double()
    tokens_BT, documents_BT = lines()
    target_BT = random_tokens(3, 17, seed=1)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def nll(output, target):
        return F.cross_entropy(output.logits_BTV.flatten(0, 1), target.flatten(), reduction="sum")

    together = gradients(
        nll(model(tokens_BT, documents_BT=documents_BT, selection="topk"), target_BT)
    )
    alone = gradients(
        sum(
            nll(model(tokens_BT[b : b + 1, s], selection="topk"), target_BT[b : b + 1, s])
            for b, s in pieces()
        )
    )
    assert together.keys() == alone.keys()
    for name in together:
        torch.testing.assert_close(together[name], alone[name], atol=1e-9, rtol=1e-9, msg=name)


def test_documents_with_padding_and_equal_numbers_on_different_lines():
    model = tiny("expert_choice")
    tokens_BT = random_tokens(2, 9)
    documents_BT = torch.tensor([[7] * 4 + [8] * 5, [8] * 5 + [7] * 4])
    mask_BT = torch.ones(2, 9, dtype=torch.bool)
    mask_BT[0, 0] = mask_BT[1, 6] = False
    output = model(tokens_BT, documents_BT=documents_BT, mask_BT=mask_BT)
    for line, columns in [
        (0, [1, 2, 3]),
        (0, [4, 5, 6, 7, 8]),
        (1, [0, 1, 2, 3, 4]),
        (1, [5, 7, 8]),
    ]:
        alone = model(tokens_BT[line : line + 1, columns])
        torch.testing.assert_close(
            output.logits_BTV[line, columns], alone.logits_BTV[0], atol=1e-5, rtol=1e-5
        )
    assert not output.logits_BTV[~mask_BT].any()


def test_documents_are_refused_where_they_have_no_meaning():
    model = tiny("expert_choice")
    tokens_BT, documents_BT = lines()
    with pytest.raises(ValueError, match="neither cache nor logits"):
        model(tokens_BT, documents_BT=documents_BT, cache=KVCache(model.config, 3))
    with pytest.raises(ValueError, match="neither cache nor logits"):
        model(tokens_BT, documents_BT=documents_BT, logits="last")
    with pytest.raises(ValueError, match=r"documents has shape \(3, 9\), tokens \(3, 17\)"):
        model(tokens_BT, documents_BT=documents_BT[:, :9])


@pytest.mark.parametrize("make", cases("pairs"))
def test_recomputed_activations_give_the_same_gradients(make):
    model, (tokens_BT, _) = make(), lines()
    found = []
    for recompute in (False, True):
        model.zero_grad()
        output = model(tokens_BT, selection="topk", recompute=recompute)
        loss = F.cross_entropy(output.logits_BTV.flatten(0, 1), random_tokens(51, seed=1))
        (loss + output.routing.weighted_loss).backward()
        found.append(
            [loss.item()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]
        )
    assert found[0][0] == found[1][0] and len(found[0]) == len(found[1]) > 5
    for plain, recomputed in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_recomputing_keeps_fewer_activations():
    model, tokens_BT = tiny("expert_choice", num_layers=14), random_tokens(4, 60)
    kept = []
    for recompute in (False, True):
        seen = {}

        def keep(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(tokens_BT, selection="topk", recompute=recompute)
        kept.append(sum(seen.values()))
    assert kept[1] < kept[0] / 3


def test_a_copy_of_a_compiled_model_has_weights_of_its_own():
    model, tokens = tiny("expert_choice"), random_tokens(1, 5)
    expected = model(tokens).logits_BTV
    model.compile_blocks(backend="eager")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(tokens).logits_BTV, expected)
        with torch.no_grad():
            other.recursions.shared_blocks[0].attention.o_proj.weight.zero_()
        assert not torch.allclose(other(tokens).logits_BTV, expected, atol=1e-2)
