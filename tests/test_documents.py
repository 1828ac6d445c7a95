"""Documents that share a line of the batch behave as if each were alone; recomputed activations
change nothing."""

import pytest
import torch
import torch.nn.functional as F
from conftest import cases, random_tokens, tiny

from mor.model.kv_cache import KVCache

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


@pytest.mark.parametrize("make", cases())
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


@pytest.mark.parametrize("make", cases())
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
