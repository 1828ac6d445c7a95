"""The chunked loss is cross-entropy, in values and gradients, and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F

import mor.model.loss as module
from mor.model.loss import linear_cross_entropy
from tests.conftest import random_tokens, tiny


@pytest.mark.parametrize("chunk", [1, 37 * 5, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(chunk, dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 12, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(37, 12, generator=generator, dtype=dtype, requires_grad=True)
    target = random_tokens(23)
    target[[3, 22]] = -100
    expected = F.cross_entropy(F.linear(x, weight), target)
    found = linear_cross_entropy(x, weight, target)
    close = dict(atol=1e-12, rtol=1e-12) if dtype == torch.float64 else dict(atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, expected, **close)
    theirs = torch.autograd.grad(expected * 3, (x, weight))
    for ours, reference in zip(torch.autograd.grad(found * 3, (x, weight)), theirs, strict=True):
        torch.testing.assert_close(ours, reference, **close)


def test_under_autocast_values_and_gradients_are_those_of_the_rounded_inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 12, generator=generator, requires_grad=True)
    weight = torch.randn(37, 12, generator=generator, requires_grad=True)
    target = random_tokens(23)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, weight, target)
    found.backward()
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(F.linear(*rounded), target)
    expected.backward()
    assert found.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
    assert abs(found.item() - expected.item()) < 0.02
    for ours, theirs in zip((x, weight), rounded, strict=True):
        assert (ours.grad - theirs.grad).norm() < 0.02 * theirs.grad.norm()


def test_frozen_parts_get_no_gradient():
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    linear_cross_entropy(x, weight, torch.arange(5)).backward()
    assert x.grad is not None and weight.grad is None
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, torch.full((5,), -100)) == 0


def test_tokens_without_a_target_cost_no_logits(monkeypatch):
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: seen.append(len(x)) or linear(x, w))
    x, weight, target = torch.randn(9, 4), torch.randn(7, 4), torch.full((9,), -100)
    target[[2, 6]] = 3
    mean, each = module.linear_cross_entropies(x, weight, target)
    assert seen == [2] and each.nonzero().flatten().tolist() == [2, 6]
    torch.testing.assert_close(mean, each.sum() / 2)


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_gives_the_same_loss_and_gradients_with_targets(tied):
    model = tiny("expert_choice", tie_embeddings=tied).double()
    tokens, targets = random_tokens(3, 14), random_tokens(3, 14, seed=1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 9:] = mask[2, :4] = False
    targets[0, 5] = -100
    output = model(tokens, mask_BT=mask, targets_BT=targets, selection="topk")
    assert output.logits_BTV.numel() == 0
    output.nll.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(tokens, mask_BT=mask, selection="topk").logits_BTV
    expected = F.cross_entropy(logits.flatten(0, 1), targets.masked_fill(~mask, -100).flatten())
    expected.backward()
    torch.testing.assert_close(output.nll, expected, atol=1e-12, rtol=1e-12)
    assert found.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                found[name], parameter.grad, atol=1e-12, rtol=1e-10, msg=name
            )


def test_no_tensor_as_large_as_the_logits_is_made(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", 37 * 8)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    self.seen = max(self.seen, t.numel())
            return out

    x, weight = torch.randn(400, 4, requires_grad=True), torch.randn(37, 4, requires_grad=True)
    with Largest() as chunked:
        linear_cross_entropy(x, weight, random_tokens(400)).backward()
    with Largest() as whole:
        F.cross_entropy(F.linear(x, weight), random_tokens(400)).backward()
    assert whole.seen == 400 * 37 and chunked.seen == 400 * 4, (
        "the input is the largest that is left"
    )
