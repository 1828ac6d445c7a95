"""Attention of single queries over paged entries: the plain definition, and faster backends with
its signature.

E entries of a pool · G key/value heads · H head dim · L width of the table · M queries · N heads ·
R rows of the table · S entries that the longest query sees
"""

from __future__ import annotations

import functools
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
    visible_MS = torch.arange(longest, device=q_MNH.device) < seen[:, None]
    entry_MS = table_RL[:, :longest].index_select(0, row)
    # In place of what it must not see it gets an entry of its own: zero times nan is nan.
    entry_MS = entry_MS.where(visible_MS, entry_MS[:, :1])
    k_MSGH, v_MSGH = (
        pool.index_select(0, entry_MS.flatten()).unflatten(0, entry_MS.shape)
        for pool in (k_EGH, v_EGH)
    )
    return attention(q_MNH[:, None], k_MSGH, v_MSGH, visible_MS[:, None]).squeeze(1)


def decode_attention(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype
) -> DecodeAttention:
    """The backend of that name, once it has been tried. ``auto`` takes the fastest that works here,
    and warns if the kernel for this device does not. Raises ValueError if the backend named does
    not work here."""
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
        kernel = _LOAD[chosen]()
        _try(kernel, device, dtype)
        return kernel
    except Exception as error:  # whatever goes wrong with a faster way, there is the plain one
        if backend != "auto":
            raise ValueError(f"attention={backend!r} is not available: {error}") from error
        _warn(f"decoding without the {chosen} attention kernel, which makes it slower: {error}")
        return gathered_attention


@functools.cache
def _warn(text: str) -> None:
    """Once in a process, however many engines it makes."""
    warnings.warn(text, stacklevel=5)


def _try(kernel: DecodeAttention, device: torch.device, dtype: torch.dtype) -> None:
    """Raise if a kernel does not run here, or gives something else than the definition."""
    q_MNH, k_EGH, v_EGH = torch.arange(384.0).sin().mul(3).view(3, 4, 2, 16).to(device, dtype)
    table_RL, row, seen = (
        torch.tensor(values, dtype=torch.int32, device=device)
        for values in ([[3, 1, 0], [2, 0, 1]], [0, 1, 1, 0], [3, 2, 1, 1])
    )
    args = (q_MNH, k_EGH, v_EGH, table_RL, row, seen)
    found, expected = (attend(*args, longest=3) for attend in (kernel, gathered_attention))
    if not torch.allclose(found, expected, atol=0.05):
        raise RuntimeError("it gives wrong results on this machine")


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
