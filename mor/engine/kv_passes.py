"""Passes over the paged cache: where the attention of some tokens writes, and what it reads.

Each is an ``AttentionPass`` of model/kv_cache.py, so the blocks of the model do not know that the
cache is paged. Decoding runs single tokens of many sequences at any mixture of depths
(:class:`LanePass`); reading a prompt runs consecutive tokens at one depth (:class:`ChunkPass`).

A rows of the batch that hold tokens · B rows of the batch · E entries of a pool · G key/value
heads · H head dim · K tokens in the fullest row · L width of a table · M tokens · N heads · R rows
of a table · S entries that a row's last token sees · V streams
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mor.engine.pages import kind_of
from mor.model.attention import attention
from mor.model.packing import PackedTokens

if TYPE_CHECKING:
    from mor.engine.paged_kv import PagedKV


@dataclass
class LanePass:
    """A pass over one token of each of several sequences, at any mixture of depths.

    kind: of the layers that it runs through (pages.py). writes: whether any token writes. place_M:
    where each token's entry goes. row_M: the row of ``kv.view_RL`` that it reads, and seen_M: how
    many entries of that row it sees, both int32. longest: at least the largest of seen_M.
    """

    kv: PagedKV
    kind: int
    writes: bool
    place_M: Tensor
    row_M: Tensor
    seen_M: Tensor
    longest: int

    def write(self, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None:
        self.kv.write(self.kind, layer, self.place_M, k_MGH, v_MGH)

    def attend(self, layer: int, q_MNH: Tensor) -> Tensor:
        k_EGH, v_EGH = self.kv.k[self.kind][layer], self.kv.v[self.kind][layer]
        return self.kv.decode_attention(
            q_MNH, k_EGH, v_EGH, self.kv.view_RL, self.row_M, self.seen_M, longest=self.longest
        )


class ChunkPass:
    """A pass over several consecutive tokens of each of several sequences, all at one depth.

    slots_B: the slot of each row of the batch.
    """

    def __init__(self, kv: PagedKV, slots_B: Tensor, stream: int, tokens: PackedTokens) -> None:
        self.kv, self.kind, self.tokens = kv, kind_of(stream), tokens
        self.writes = bool(kv.writes[stream])
        self.place_M, seen_M = kv.append_chunk(slots_B[tokens.row_M], stream, tokens)
        # One gather for all layers and both keys and values.
        slots_A = slots_B if tokens.rows is None else slots_B[tokens.rows]
        view_AL = kv.view_RL[slots_A * kv.num_streams + int(kv.view_of_V[stream])]
        self.entry_AS = view_AL[:, : int(seen_M.max())]
        width = self.entry_AS.shape[1]
        # A padded query sees everything, so that its (unused) softmax is finite.
        seen_AK = tokens.pad(seen_M, fill=width)
        self.visible_AKS = torch.arange(width, device=kv.device) < seen_AK[:, :, None]

    def write(self, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None:
        self.kv.write(self.kind, layer, self.place_M, k_MGH, v_MGH)

    def attend(self, layer: int, q_MNH: Tensor) -> Tensor:
        k_ASGH, v_ASGH = (
            pool[self.kind][layer]
            .index_select(0, self.entry_AS.flatten())
            .unflatten(0, self.entry_AS.shape)
            for pool in (self.kv.k, self.kv.v)
        )
        q_AKNH = self.tokens.pad(q_MNH)
        return self.tokens.unpad(attention(q_AKNH, k_ASGH, v_ASGH, self.visible_AKS))


class PagedBatch:
    """Some running sequences as the cache of an ordinary forward.

    slots: the slot of each row of the batch. lengths: tokens that each has cached. Pages for what
    the forward adds must be free: the caller makes room first.
    """

    def __init__(self, kv: PagedKV, slots: Sequence[int], lengths: Sequence[int]) -> None:
        self.kv, self.slots = kv, np.asarray(slots)
        self.slots_B = torch.from_numpy(self.slots).to(kv.device)
        self.batch = len(slots)
        self.length_B = torch.tensor(lengths, device=kv.device)

    def open(
        self, stream: int, reads: tuple[int, ...], tokens: PackedTokens
    ) -> LanePass | ChunkPass:
        count_B = tokens.count_B.cpu().numpy()
        self.kv.reserve(self.slots, np.full(len(self.slots), stream), count_B)
        if count_B.max() > 1:
            opened: LanePass | ChunkPass = ChunkPass(self.kv, self.slots_B, stream, tokens)
        else:
            opened = self._open_lanes(stream, tokens)
        self.kv.refresh()
        return opened

    def _open_lanes(self, stream: int, tokens: PackedTokens) -> LanePass:
        """One token of each sequence: the same as in decoding, with its faster attention."""
        stream_M = torch.full_like(tokens.row_M, stream)
        return self.kv.append(
            self.slots_B[tokens.row_M],
            stream_M,
            tokens.position_M,
            torch.ones_like(stream_M, dtype=torch.bool),
            kind=kind_of(stream),
        )
