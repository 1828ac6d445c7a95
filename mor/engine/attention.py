"""Attention of single queries over paged entries: the plain definition, and faster backends with
its signature.

M queries · E entries of a pool · L longest sequence · N heads · G key/value heads · H head dim
"""

from __future__ import annotations

import warnings
from typing import Literal, Protocol

import torch
from torch import Tensor

from mor.engine import cpu_attention
from mor.model.attention import attention

AttentionBackend = Literal["auto", "gathered", "compiled", "triton"]


class DecodeAttention(Protocol):
    def __call__(
        self,
        q_MNH: Tensor,
        k_EGH: Tensor,
        v_EGH: Tensor,
        table_RL: Tensor,
        row_M: Tensor,
        seen_M: Tensor,
        *,
        longest: int,
    ) -> Tensor:
        """Query m attends to the entries ``table_RL[row_M[m], :seen_M[m]]``; returns (M, N, H).

        Tables, rows and counts are int32; longest: the largest of ``seen_M``.
        """


def gathered_attention(
    q_MNH: Tensor,
    k_EGH: Tensor,
    v_EGH: Tensor,
    table_RL: Tensor,
    row_M: Tensor,
    seen_M: Tensor,
    *,
    longest: int,
) -> Tensor:
    """The definition: copy the entries of each query side by side, hide what it may not see."""
    entry_MS = table_RL[:, :longest].index_select(0, row_M)
    k, v = (
        pool.index_select(0, entry_MS.flatten()).unflatten(0, entry_MS.shape)
        for pool in (k_EGH, v_EGH)
    )
    visible_MS = torch.arange(longest, device=q_MNH.device) < seen_M[:, None]
    return attention(q_MNH[:, None], k, v, visible_MS[:, None]).squeeze(1)


def decode_attention(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype
) -> DecodeAttention:
    """The backend of that name; ``auto`` takes the fastest that works here, and warns if that is
    the slow one."""
    if backend not in ("auto", "gathered", "compiled", "triton"):
        raise ValueError(
            f"attention={backend!r} is not known; choose 'auto', 'gathered', 'compiled' or 'triton'"
        )
    fits = {
        "compiled": device.type == "cpu" and dtype == torch.float32,
        "triton": device.type == "cuda",
    }
    if backend == "gathered" or (backend == "auto" and not any(fits.values())):
        return gathered_attention
    chosen = next(name for name, fit in fits.items() if fit) if backend == "auto" else backend
    if not fits[chosen]:
        needs = {"compiled": "float32 on the CPU", "triton": "a CUDA device"}[chosen]
        raise ValueError(f"attention={chosen!r} needs {needs}, got {dtype} on {device}; use 'auto'")
    try:
        return {"compiled": _compiled, "triton": _triton}[chosen]()
    except (cpu_attention.CompilerError, ImportError) as error:
        if backend != "auto":
            raise ValueError(f"attention={backend!r} cannot be had: {error}") from error
        warnings.warn(
            f"decoding without the {chosen} attention kernel, which is slower: {error}",
            stacklevel=2,
        )
        return gathered_attention


def _compiled() -> DecodeAttention:
    cpu_attention.prepare()
    return cpu_attention.compiled_attention


def _triton() -> DecodeAttention:
    from mor.engine.triton_attention import triton_attention

    return triton_attention
