"""Passes over the paged cache: where the attention of some tokens writes, and what it reads.

Each is an ``AttentionPass`` of model/kv_cache.py, so the blocks of the model do not know that the
cache is paged. Decoding runs single tokens of many sequences at any mixture of depths
(:class:`LanePass`); reading a prompt runs consecutive tokens at one depth (:class:`ChunkPass`).

A rows of the batch that hold tokens · E entries of a pool · G key/value heads · H head dim · K
tokens in the fullest row · L width of a table · M tokens · N heads · R rows of a table · S entries
that a row's last token sees
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
from mor.model.kv_cache import LEFT
from mor.model.packing import PackedTokens

if TYPE_CHECKING:
    from mor.engine.paged_kv import PagedKV


@dataclass
class LanePass:
    """A pass over one token of each of several sequences, at any mixture of depths.

    kind: of the layers that it runs through (pages.py). writes: whether any token writes. place:
    where each token's entry goes. row: the row of ``kv.view_RL`` that it reads, and seen: how
    many entries of that row it sees, both int32. longest: at least the largest of seen.
    """

    kv: PagedKV
    kind: int
    writes: bool
    place: Tensor
    row: Tensor
    seen: Tensor
    longest: int

    def write(self, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None:
        self.kv.write(self.kind, layer, self.place, k_MGH, v_MGH)

    def attend(self, layer: int, q_MNH: Tensor) -> Tensor:
        k_EGH, v_EGH = self.kv.k[self.kind][layer], self.kv.v[self.kind][layer]
        return self.kv.decode_attention(
            q_MNH, k_EGH, v_EGH, self.kv.view_RL, self.row, self.seen, longest=self.longest
        )


class ChunkPass:
    """A pass over several consecutive tokens of each of several sequences, all at one depth.

    slots_on_device: the slot of each row of the batch.
    """

    def __init__(
        self, kv: PagedKV, slots_on_device: Tensor, stream: int, tokens: PackedTokens
    ) -> None:
        self.kv, self.kind, self.tokens = kv, kind_of(stream), tokens
        self.writes = bool(kv.writes[stream])
        self.place, seen = kv.append_chunk(slots_on_device[tokens.row], stream, tokens)
        # One gather for all layers and both keys and values.
        slots_with_tokens = slots_on_device if tokens.rows is None else slots_on_device[tokens.rows]
        view_AL = kv.view_RL[slots_with_tokens * kv.num_streams + int(kv.view_of[stream])]
        self.entry_AS = view_AL[:, : int(seen.max())]
        width = self.entry_AS.shape[1]
        # A padded query sees everything, so that its (unused) softmax is finite.
        seen_AK = tokens.pad(seen, fill=width)
        self.visible_AKS = torch.arange(width, device=kv.device) < seen_AK[:, :, None]
        # A row gets nothing of others, not even under a mask: zero times nan is nan.
        last_seen = seen[tokens.last_index()]
        own_AS = torch.arange(width, device=kv.device) < last_seen[:, None]
        self.entry_AS = self.entry_AS.where(own_AS, self.entry_AS[:, :1])

    def write(self, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None:
        self.kv.write(self.kind, layer, self.place, k_MGH, v_MGH)

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
        self.slots_on_device = torch.from_numpy(self.slots).to(kv.device)
        self.batch = len(slots)
        self.length = torch.tensor(lengths, device=kv.device)
        self.newest = 0
        """The stream opened last."""

    def open(
        self, stream: int, reads: tuple[int, ...], tokens: PackedTokens
    ) -> LanePass | ChunkPass:
        if stream == LEFT:  # of tokens that took the recursion before, which is the newest
            slot = self.slots_on_device[tokens.row]
            leaves = self.newest < self.kv.most_on_device[slot]
            return self.kv.append_left(slot, tokens.position, leaves)
        self.newest = stream
        count = tokens.count.cpu().numpy()
        self.kv.reserve(self.slots, np.full(len(self.slots), stream), count)
        if count.max() > 1:
            opened: LanePass | ChunkPass = ChunkPass(self.kv, self.slots_on_device, stream, tokens)
        else:
            opened = self._open_lanes(stream, tokens)
        self.kv.refresh()
        return opened

    def _open_lanes(self, stream: int, tokens: PackedTokens) -> LanePass:
        """One token of each sequence: the same as in decoding, with its faster attention."""
        streams = torch.full_like(tokens.row, stream)
        return self.kv.append(
            self.slots_on_device[tokens.row],
            streams,
            tokens.position,
            torch.ones_like(streams, dtype=torch.bool),
            kind=kind_of(stream),
        )
