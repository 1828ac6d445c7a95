"""Attention: one signature for padded rows, one for packed tokens, each with its plain definition.

Padded rows are what a cache holds. Packed tokens are what a forward without a cache has, in
training and evaluation; there a query sees the keys of its own row at or before its own position,
and :class:`PackedAttention` takes the kernel that suits the lengths of the rows and the device.

A rows · K queries of a row · S keys · N heads · G key/value heads · H head dim · M packed queries
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mor.model.compiling import compiled
from mor.model.packing import PackedTokens, take

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK = 128
"""Queries, and keys, that FlexAttention decides upon together."""


REPEATED = 16
"""Passes of a shape after which it gets cuDNN's kernel on Hopper."""


def attention(
    q_AKNH: Tensor,
    k_ASGH: Tensor,
    v_ASGH: Tensor,
    mask_AKS: Tensor | None,
    *,
    repeated: bool = False,
) -> Tensor:
    """Grouped-query softmax attention, (A, K, N, H).

    mask_AKS: which key each query may see, as truth values or as a bias (:func:`as_bias`); None
    means causal, query i sees keys 0..i (then K = S). repeated: whether these shapes come so often
    that a kernel made for them alone pays.
    """
    mask = None if mask_AKS is None else mask_AKS.unsqueeze(1)
    groups = q_AKNH.shape[2] // k_ASGH.shape[2]
    if groups > 1 and q_AKNH.device.type == "cuda" and (mask is not None or q_AKNH.itemsize > 2):
        # There the fused kernels take groups only without a mask and in half precision; what is
        # left keeps the whole softmax in memory.
        k_ASGH, v_ASGH = (
            t.unsqueeze(3).expand(-1, -1, -1, groups, -1).flatten(2, 3) for t in (k_ASGH, v_ASGH)
        )
        groups = 1
    with _kernels(q_AKNH.device, cudnn=repeated and mask is None):
        out = F.scaled_dot_product_attention(
            q_AKNH.transpose(1, 2),
            k_ASGH.transpose(1, 2),
            v_ASGH.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=groups > 1,
        )
    return out.transpose(1, 2)


def _kernels(device: torch.device, *, cudnn: bool) -> AbstractContextManager[object]:
    """Which of PyTorch's kernels may run. cuDNN's is the fastest on Hopper, but makes a plan for
    every shape, which takes as long as many passes, gave wrong gradients with masks there, and
    wrong values with few key/value heads on later GPUs."""
    if device.type != "cuda":
        return nullcontext()
    if cudnn and torch.cuda.get_device_capability(device)[0] == 9:
        return nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


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


def plain_packed_attention(
    q_MNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, queries: PackedTokens, keys: PackedTokens
) -> Tensor:
    """The definition that :class:`PackedAttention` must equal, (M, N, H)."""
    same_row_MS = queries.row[:, None] == keys.row
    visible_MS = same_row_MS & (keys.position <= queries.position[:, None])
    return plain_attention(q_MNH[None], k_SGH[None], v_SGH[None], visible_MS[None])[0]


_PASSES: Counter[tuple[int, int]] = Counter()
"""Passes in this process by rows and queries of a row, where all rows have the same number."""


class PackedAttention:
    """Attention of packed queries over packed keys; what it needs to know of the rows is made once
    for all layers of a pass.

    queries: tokens that attend. keys: the same ones, or all tokens of the rows from position 0 on.

    rows of equal length, own keys        causal attention, nothing is padded or masked
    rows of any length, own keys          CUDA: a kernel for packed rows; else padded, causal
    keys of all tokens                    CUDA with Triton: FlexAttention; else padded, with a mask
    padded rows of very different length  in groups of rows alike
    """

    def __init__(self, queries: PackedTokens, keys: PackedTokens) -> None:
        self.queries, self.keys = queries, keys
        self._bias_AKS: Tensor | None = None

    @functools.cached_property
    def _repeated(self) -> bool:
        """Whether passes of this shape come again and again. Once for all layers, and for their
        recomputation: a shape does not change its kernel within a pass."""
        if self.queries.per_row is None:
            return False
        shape = self.queries.num_rows, self.queries.per_row
        _PASSES[shape] += 1
        return _PASSES[shape] > REPEATED

    def __call__(self, q_MNH: Tensor, k_SGH: Tensor, v_SGH: Tensor) -> Tensor:
        return self._kernel(q_MNH)(q_MNH, k_SGH, v_SGH)

    def _kernel(self, q_MNH: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if q_MNH.device.type != "cuda":
            return self.padded
        if self.queries is not self.keys:
            return self.flex if importlib.util.find_spec("triton") else self.padded
        half = q_MNH.dtype in (torch.bfloat16, torch.float16)
        if self.queries.per_row is None and half and q_MNH.shape[-1] % 8 == 0:
            return self.varlen
        return self.padded

    # Padded rows

    def padded(self, q_MNH: Tensor, k_SGH: Tensor, v_SGH: Tensor) -> Tensor:
        """Any device, any precision. Rows of very different length in turns: one long document
        would make a row as long of each short one."""
        if not self._parts:
            return self._padded(q_MNH, k_SGH, v_SGH)
        mixed = [
            part._padded(take(q_MNH, queries), take(k_SGH, keys), take(v_SGH, keys))
            for part, queries, keys in self._parts
        ]
        return take(torch.cat(mixed), self._order)

    @functools.cached_property
    def _order(self) -> Tensor:
        """Where each query stands when the parts are one after the other."""
        return torch.cat([queries for _, queries, _ in self._parts]).argsort()

    @functools.cached_property
    def _parts(self) -> list[tuple[PackedAttention, Tensor, Tensor]]:
        """The same for each group of rows alike, and where its queries and keys stand; empty where
        all are."""
        found = []
        for rows in self.keys.rows_alike():
            at, keys = (rows[t.row].nonzero().squeeze(1) for t in (self.queries, self.keys))
            if len(at):
                queries = self.queries.select(at)
                own = self.queries is self.keys
                part = PackedAttention(queries, queries if own else self.keys.select(keys))
                found.append((part, at, keys))
        return found

    def _padded(self, q_MNH: Tensor, k_SGH: Tensor, v_SGH: Tensor) -> Tensor:
        mask = None if self.queries is self.keys else self._bias(q_MNH.dtype)
        k_ASGH, v_ASGH = self._key_lines(k_SGH), self._key_lines(v_SGH)
        q_AKNH = self.queries.pad(q_MNH)
        return self.queries.unpad(attention(q_AKNH, k_ASGH, v_ASGH, mask, repeated=self._repeated))

    def _key_lines(self, x_SGH: Tensor) -> Tensor:
        """Padded keys of the rows that hold queries."""
        x_ASGH, rows = self.keys.pad(x_SGH), self.queries.rows
        if rows is None or rows is self.keys.rows:
            return x_ASGH
        return x_ASGH[rows if self.keys.lane is None else self.keys.lane[rows]]

    @functools.cached_property
    def _position_AK(self) -> Tensor:
        # Padding sees a key, so that its (unused) softmax is finite.
        return self.queries.pad(self.queries.position, fill=0)

    def _bias(self, dtype: torch.dtype) -> Tensor:
        # Once for all layers: the kernel would make a copy for each, and keep it for backward.
        if self._bias_AKS is None or self._bias_AKS.dtype != dtype:
            keys = torch.arange(self.keys.longest, device=self._position_AK.device)
            self._bias_AKS = as_bias(keys <= self._position_AK[:, :, None], dtype)
        return self._bias_AKS

    # Packed rows

    def varlen(self, q_MNH: Tensor, k_SGH: Tensor, v_SGH: Tensor) -> Tensor:
        """CUDA in half precision, keys of the queries themselves."""
        most = self.queries.batch_shape[1]  # a bound, so that the host does not wait for the counts
        out_MNH: Tensor = _causal_varlen(
            q_MNH.contiguous(), k_SGH.contiguous(), v_SGH.contiguous(), self._ends, most
        )
        return out_MNH

    @functools.cached_property
    def _ends(self) -> Tensor:
        """Where each row begins among the packed tokens, and the end of the last one."""
        return F.pad(self.queries.count.cumsum(0), (1, 0)).int()

    # FlexAttention

    def flex(self, q_MNH: Tensor, k_SGH: Tensor, v_SGH: Tensor) -> Tensor:
        """Keys of all tokens, all rows in one line; skips blocks of keys that no query of a block
        sees, and so the other rows."""
        out_1NMH = _compiled_flex()(
            q_MNH.transpose(0, 1)[None],
            k_SGH.transpose(0, 1)[None],
            v_SGH.transpose(0, 1)[None],
            block_mask=self._block_mask,
            enable_gqa=q_MNH.shape[1] != k_SGH.shape[1],
            kernel_options={"BACKEND": "TRITON"},  # not the one for few queries, without gradients
        )
        return out_1NMH[0].transpose(0, 1)

    @functools.cached_property
    def _block_mask(self) -> BlockMask:
        begin = self.keys.count.cumsum(0) - self.keys.count
        first = begin[self.queries.row]
        return ranges_mask(first, first + self.queries.position, len(self.keys))


def _causal_varlen(q_MNH: Tensor, k_SGH: Tensor, v_SGH: Tensor, ends: Tensor, most: int) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    # Named since PyTorch 2.12; before, the kernel takes groups without being told.
    named: dict[str, Any] = (
        {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    )
    return varlen_attn(q_MNH, k_SGH, v_SGH, ends, ends, most, most, window_size=(-1, 0), **named)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention)


def ranges_mask(first: Tensor, last: Tensor, num_keys: int) -> BlockMask:
    """Query m sees the keys first[m]..last[m] of ``num_keys``; neither number ever falls from one
    query to the next. Made from the ends of each block of queries, not from all pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    queries, blocks = len(first), -(-num_keys // FLEX_BLOCK)
    start = torch.arange(0, queries, FLEX_BLOCK, device=first.device)
    end = (start + FLEX_BLOCK - 1).clamp(max=queries - 1)
    # Blocks of keys that some query sees, and those among them that all queries see whole.
    seen, seen_end = first[start] // FLEX_BLOCK, last[end] // FLEX_BLOCK + 1
    whole = -(-first[end] // FLEX_BLOCK)
    num_whole = ((last[start] + 1) // FLEX_BLOCK - whole).clamp(min=0)
    every = torch.arange(blocks, device=first.device)
    before = (whole - seen)[:, None]
    in_part = seen[:, None] + every + torch.where(every >= before, num_whole[:, None], 0)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[query] <= key) & (key <= last[query])

    def listed(blocks_of_queries: Tensor) -> Tensor:
        return blocks_of_queries[None, None].int().contiguous()

    return BlockMask.from_kv_blocks(
        listed(seen_end - seen - num_whole),
        listed(in_part % blocks),
        listed(num_whole),
        listed((whole[:, None] + every) % blocks),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(queries, num_keys),
    )
