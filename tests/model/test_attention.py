"""Attention equals its plain definition."""

import pytest
import torch

from mor.model.attention import attention, plain_attention


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_its_plain_definition_in_values_and_gradients(heads, kv_heads, causal):
    generator = torch.Generator().manual_seed(0)
    queries, keys = (7, 7) if causal else (5, 11)
    shapes = [(2, queries, heads, 6), (2, keys, kv_heads, 6), (2, keys, kv_heads, 6)]
    inputs = [
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes
    ]
    visible = None
    if not causal:
        visible = torch.rand(2, queries, keys, generator=generator) < 0.6
        visible[..., 0] = True
    fast, plain = attention(*inputs, visible), plain_attention(*inputs, visible)
    assert (fast - plain).abs().max() < 1e-12
    probe = torch.randn(fast.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((plain * probe).sum(), inputs),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-11
