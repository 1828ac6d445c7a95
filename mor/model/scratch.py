"""Keys and values of a forward without a cache: packed, and kept only while later passes read them.

The streams and what each recursion reads are those of kv_cache.py.

M packed tokens · G key/value heads · N heads · H head dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from mor.model.attention import PackedAttention
from mor.model.packing import PackedTokens

Entries = tuple[Tensor, Tensor]
"""Keys and values of a layer, (M, G, H) each."""


class Scratch:
    """kept: the streams that later passes read, each with an entry for every token."""

    everyone: PackedTokens

    def __init__(self, kept: tuple[int, ...]) -> None:
        self.kept = kept
        self.entries: dict[tuple[int, int], Entries] = {}

    def open(self, stream: int, reads: tuple[int, ...], tokens: PackedTokens) -> ScratchPass:
        if stream == 0:
            self.everyone = tokens
        if stream in reads and len(tokens) == len(self.everyone):  # it replaces all it would read
            reads = (stream,)
        return ScratchPass(self, stream, reads, tokens)


class ScratchPass:
    """A pass over ``tokens``, whose queries see them, or every token that there is."""

    def __init__(
        self, store: Scratch, stream: int, reads: tuple[int, ...], tokens: PackedTokens
    ) -> None:
        self.store, self.stream, self.reads = store, stream, reads
        self.writes = stream in reads
        keys = tokens if reads == (stream,) else store.everyone
        self.attention = PackedAttention(tokens, keys)
        self.own: Entries | None = None
        self.place = torch.searchsorted(store.everyone.place, tokens.place)

    def write(self, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None:
        self.own = k_MGH, v_MGH
        if self.stream in self.store.kept:
            self.store.entries[self.stream, layer] = self._placed(self.stream, layer)

    def _placed(self, stream: int, layer: int) -> Entries:
        """A stream's entries, with those of the pass in the places of its tokens."""
        assert self.own is not None
        k_own, v_own = self.own
        if len(k_own) == len(self.store.everyone):
            return self.own
        unwritten = k_own.new_zeros(len(self.store.everyone), *k_own.shape[1:])
        k, v = self.store.entries.get((stream, layer), (unwritten, unwritten))
        return k.index_copy(0, self.place, k_own), v.index_copy(0, self.place, v_own)

    def attend(self, layer: int, q_MNH: Tensor) -> Tensor:
        return self.attention(q_MNH, *self._entries(layer))

    def _entries(self, layer: int) -> Entries:
        if self.stream not in self.reads:
            return self.store.entries[self.reads[0], layer]
        assert self.own is not None, f"stream {self.stream} was read before it was written"
        return self.own if len(self.reads) == 1 else self._placed(self.reads[0], layer)
