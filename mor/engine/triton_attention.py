"""Paged attention for CUDA in Triton: no copies of entries, one program for each query and
key/value head.

So far it has only run in Triton's interpreter (`TRITON_INTERPRET=1`), not on a GPU; see
tests/engine/test_triton_attention.py.

E entries of a pool · G key/value heads · H head dim · L width of the table · M queries · N heads ·
R rows of the table
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 64  # read in one iteration of the loop


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, table_ptr, row_ptr, seen_ptr, out_ptr, scale, table_width,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, HEADS_PADDED: tl.constexpr,
    DIM_PADDED: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the entries that query ``m`` sees, for the query heads that share
    key/value head ``g``."""
    m, g = tl.program_id(0), tl.program_id(1)
    per_group: tl.constexpr = HEADS // GROUPS
    head = tl.arange(0, HEADS_PADDED)
    dim = tl.arange(0, DIM_PADDED)
    entry = tl.arange(0, ENTRIES)
    real_dim = dim < DIM
    at_query = (m * HEADS + g * per_group + head[:, None]) * DIM + dim[None, :]
    real_query = (head[:, None] < per_group) & real_dim[None, :]
    q = tl.load(q_ptr + at_query, mask=real_query, other=0.0)

    seen = tl.load(seen_ptr + m)
    table = table_ptr + tl.load(row_ptr + m).to(tl.int64) * table_width
    top = tl.full([HEADS_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_PADDED], tl.float32)
    result = tl.zeros([HEADS_PADDED, DIM_PADDED], tl.float32)
    for start in range(0, seen, ENTRIES):
        visible = start + entry < seen
        place = tl.load(table + start + entry, mask=visible, other=0).to(tl.int64)
        at = (place[:, None] * GROUPS + g) * DIM + dim[None, :]
        real = visible[:, None] & real_dim[None, :]
        k = tl.load(k_ptr + at, mask=real, other=0.0)
        v = tl.load(v_ptr + at, mask=real, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(visible[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        result = result * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        top = new_top
    result = (result / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at_query, result, mask=real_query)


def triton_attention(
    q_MNH: Tensor,
    k_EGH: Tensor,
    v_EGH: Tensor,
    table_RL: Tensor,
    row: Tensor,
    seen: Tensor,
    *,
    longest: int,
) -> Tensor:
    """As :func:`mor.engine.attention.gathered_attention`. ``longest`` is not used."""
    q_MNH = q_MNH.contiguous()
    M, N, H = q_MNH.shape
    groups, out_MNH = k_EGH.shape[1], torch.empty_like(q_MNH)
    _attend[(M, groups)](
        q_MNH, k_EGH, v_EGH, table_RL, row, seen, out_MNH, H**-0.5, table_RL.stride(0),
        HEADS=N, GROUPS=groups, DIM=H, HEADS_PADDED=max(16, triton.next_power_of_2(N // groups)),
        DIM_PADDED=max(16, triton.next_power_of_2(H)), ENTRIES=ENTRIES,
    )  # fmt: skip
    return out_MNH
