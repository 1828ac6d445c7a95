"""Attention of single queries over paged entries: the plain definition, and faster backends with
its signature.

E entries of a pool · G key/value heads · H head dim · L width of the table · M queries · N heads ·
R rows of the table · S entries that the longest query sees
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
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
        row: Tensor,
        seen: Tensor,
        *,
        longest: int,
    ) -> Tensor:
        """Query m attends to the entries ``table_RL[row[m], :seen[m]]``; returns (M, N, H).

        table_RL: places in the pool. row: the row of the table that each query reads. seen: how
        many entries of it, at least 1. All three are int32. longest: at least the largest of
        ``seen``.
        """


def gathered_attention(
    q_MNH: Tensor,
    k_EGH: Tensor,
    v_EGH: Tensor,
    table_RL: Tensor,
    row: Tensor,
    seen: Tensor,
    *,
    longest: int,
) -> Tensor:
    """The definition: gather the entries of each query and mask what it must not see."""
    entry_MS = table_RL[:, :longest].index_select(0, row)
    k_MSGH, v_MSGH = (
        pool.index_select(0, entry_MS.flatten()).unflatten(0, entry_MS.shape)
        for pool in (k_EGH, v_EGH)
    )
    visible_MS = torch.arange(longest, device=q_MNH.device) < seen[:, None]
    return attention(q_MNH[:, None], k_MSGH, v_MSGH, visible_MS[:, None]).squeeze(1)


def decode_attention(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype
) -> DecodeAttention:
    """The backend of that name. ``auto`` takes the fastest that works here, and warns if the kernel
    for this device does not. Raises ValueError if the backend named does not work here."""
    if backend not in ("auto", "gathered", "compiled", "triton"):
        raise ValueError(
            f"attention={backend!r} is not known; choose 'auto', 'gathered', 'compiled' or 'triton'"
        )
    fits = {
        "compiled": device.type == "cpu" and dtype == torch.float32,
        "triton": device.type == "cuda",
        "gathered": True,
    }
    chosen = next(name for name, fit in fits.items() if fit) if backend == "auto" else backend
    if not fits[chosen]:
        needs = {"compiled": "float32 on the CPU", "triton": "a CUDA device"}[chosen]
        raise ValueError(f"attention={chosen!r} needs {needs}, got {dtype} on {device}; use 'auto'")
    try:
        return _LOAD[chosen]()
    except (cpu_attention.CompilerError, ImportError) as error:
        if backend != "auto":
            raise ValueError(f"attention={backend!r} is not available: {error}") from error
        warnings.warn(
            f"decoding without the {chosen} attention kernel, which makes it slower: {error}",
            stacklevel=2,
        )
        return gathered_attention


def _gathered() -> DecodeAttention:
    return gathered_attention


def _compiled() -> DecodeAttention:
    cpu_attention.prepare()
    return cpu_attention.compiled_attention


def _triton() -> DecodeAttention:
    from mor.engine.triton_attention import triton_attention

    return triton_attention


_LOAD: dict[str, Callable[[], DecodeAttention]] = {
    "gathered": _gathered,
    "compiled": _compiled,
    "triton": _triton,
}
