"""Attention over padded rows: one signature, a plain definition and PyTorch's fused kernel.

A rows · K queries · S keys · N heads · G key/value heads · H head dim
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q_AKNH: Tensor, k_ASGH: Tensor, v_ASGH: Tensor, mask_AKS: Tensor | None) -> Tensor:
    """Grouped-query softmax attention, (A, K, N, H).

    mask_AKS: which key each query may see, as truth values or as a bias (:func:`as_bias`); None
    means causal, query i sees keys 0..i (then K = S).
    """
    mask = None if mask_AKS is None else mask_AKS[:, None]
    out = F.scaled_dot_product_attention(
        q_AKNH.transpose(1, 2),
        k_ASGH.transpose(1, 2),
        v_ASGH.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_AKNH.shape[2] != k_ASGH.shape[2],
    )
    return out.transpose(1, 2)


def as_bias(visible_AKS: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0 where a query sees a key, minus infinity where it does not."""
    return torch.zeros(visible_AKS.shape, dtype=dtype, device=visible_AKS.device).masked_fill_(
        ~visible_AKS, float("-inf")
    )


def plain_attention(
    q_AKNH: Tensor, k_ASGH: Tensor, v_ASGH: Tensor, visible_AKS: Tensor | None
) -> Tensor:
    """The definition that :func:`attention` must equal."""
    groups = q_AKNH.shape[2] // k_ASGH.shape[2]
    k, v = (t.repeat_interleave(groups, dim=2) for t in (k_ASGH, v_ASGH))
    scores_ANKS = torch.einsum("aknh,asnh->anks", q_AKNH, k) / q_AKNH.shape[-1] ** 0.5
    if visible_AKS is None:
        visible_AKS = torch.ones(
            scores_ANKS.shape[-2:], dtype=torch.bool, device=q_AKNH.device
        ).tril()[None]
    weights = scores_ANKS.masked_fill(~visible_AKS[:, None], float("-inf")).softmax(-1)
    return torch.einsum("anks,asnh->aknh", weights, v)
