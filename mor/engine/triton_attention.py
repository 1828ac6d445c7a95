"""Paged attention for CUDA in Triton: no copies of entries, one program for each query, key/value
head and part of the context.

So far it has only run in Triton's interpreter (`TRITON_INTERPRET=1`) and been compiled for sm80 and
sm90, not on a GPU; see tests/engine/test_triton_attention.py.

E entries of a pool · G key/value heads · H head dim · L width of the table · M queries · N heads ·
P parts of the context · R rows of the table
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 64  # read in one iteration of the loop
PART = 256  # fewer entries are not worth a part of their own


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, table_ptr, row_ptr, seen_ptr, out_ptr, top_ptr, total_ptr,
    scale, table_width, query_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, HEADS_PADDED: tl.constexpr,
    DIM_PADDED: tl.constexpr, ENTRIES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Online softmax over one part of the entries that query ``m`` sees, for the query heads that
    share key/value head ``g``. One of several parts stores what :func:`_combine` needs, (M, N, P)
    each: the sum of weighted values, the largest score, and the sum of weights."""
    m, g, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    per_group: tl.constexpr = HEADS // GROUPS
    head = tl.arange(0, HEADS_PADDED)
    dim = tl.arange(0, DIM_PADDED)
    entry = tl.arange(0, ENTRIES)
    real_dim = dim < DIM
    real_head = head < per_group
    real_query = real_head[:, None] & real_dim[None, :]
    at_head = m * HEADS + g * per_group + head
    at_query = m * query_stride + (g * per_group + head[:, None]) * DIM + dim[None, :]
    q = tl.load(q_ptr + at_query, mask=real_query, other=0.0)

    seen = tl.load(seen_ptr + m)
    part_size = tl.cdiv(tl.cdiv(seen, PARTS), ENTRIES) * ENTRIES
    table = table_ptr + tl.load(row_ptr + m).to(tl.int64) * table_width
    top = tl.full([HEADS_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_PADDED], tl.float32)
    result = tl.zeros([HEADS_PADDED, DIM_PADDED], tl.float32)
    for start in range(part * part_size, min(seen, (part + 1) * part_size), ENTRIES):
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
    if PARTS == 1:
        result = (result / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at_head[:, None] * DIM + dim[None, :], result, mask=real_query)
    else:
        at_part = at_head * PARTS + part
        tl.store(out_ptr + at_part[:, None] * DIM + dim[None, :], result, mask=real_query)
        tl.store(top_ptr + at_part, top, mask=real_head)
        tl.store(total_ptr + at_part, total, mask=real_head)


@triton.jit  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    result_ptr, top_ptr, total_ptr, out_ptr,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr,
):  # fmt: skip
    """The attention of one query and head from that of its parts. A part without entries has the
    largest score minus infinity, and counts nothing."""
    query_head = tl.program_id(0)
    dim, part = tl.arange(0, DIM_PADDED), tl.arange(0, PARTS_PADDED)
    real_dim, real_part = dim < DIM, part < PARTS
    at_part = query_head * PARTS + part
    top = tl.load(top_ptr + at_part, mask=real_part, other=float("-inf"))
    total = tl.load(total_ptr + at_part, mask=real_part, other=0.0)
    at = at_part[:, None] * DIM + dim[None, :]
    real = real_part[:, None] & real_dim[None, :]
    result = tl.load(result_ptr + at, mask=real, other=0.0)
    weight = tl.exp(top - tl.max(top, 0))
    out = tl.sum(result * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out_ptr + query_head * DIM + dim, out.to(out_ptr.dtype.element_ty), mask=real_dim)


def num_parts(programs: int, longest: int, processors: int) -> int:
    """Into how many parts contexts are split. One suffices where the queries keep all processors
    busy, or where the longest context is short. It depends on sizes that are fixed in a CUDA graph,
    not on the lengths at hand, which only the device knows.

    programs: queries times key/value heads. longest: entries that any query sees at most.
    """
    if programs >= processors:
        return 1
    return max(1, min(longest // PART, -(-2 * processors // programs)))


@functools.cache
def _processors(device: torch.device) -> int:
    """Of a GPU; the interpreter takes those of an H100."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


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
    """As :func:`mor.engine.attention.gathered_attention`."""
    M, N, H = q_MNH.shape
    if q_MNH.stride()[1:] != (H, 1):  # of fused projections, only the queries lie far apart
        q_MNH = q_MNH.contiguous()
    groups, device = k_EGH.shape[1], q_MNH.device
    parts = num_parts(M * groups, longest, _processors(device))
    dim_padded = max(16, triton.next_power_of_2(H))
    out_MNH = q_MNH.new_empty(M, N, H)
    result = top_MNP = total_MNP = out_MNH  # the last two unused
    if parts > 1:
        result = torch.empty(M, N, parts, H, dtype=torch.float32, device=device)
        top_MNP, total_MNP = result.new_empty(2, M, N, parts)
    with torch.cuda.device_of(q_MNH):  # Triton launches on the current device
        _attend[(M, groups, parts)](
            q_MNH, k_EGH, v_EGH, table_RL, row, seen, result, top_MNP, total_MNP,
            H**-0.5, table_RL.stride(0), q_MNH.stride(0),
            HEADS=N, GROUPS=groups, DIM=H,
            HEADS_PADDED=max(16, triton.next_power_of_2(N // groups)),
            DIM_PADDED=dim_padded, ENTRIES=ENTRIES, PARTS=parts,
        )  # fmt: skip
        if parts > 1:
            _combine[(M * N,)](
                result, top_MNP, total_MNP, out_MNH, DIM=H, DIM_PADDED=dim_padded,
                PARTS=parts, PARTS_PADDED=triton.next_power_of_2(parts),
            )  # fmt: skip
    return out_MNH
