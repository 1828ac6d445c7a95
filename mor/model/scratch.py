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
    """kept: the streams that later passes read."""

    def __init__(self, kept: tuple[int, ...]) -> None:
        self.kept = kept
        self.tokens: dict[int, PackedTokens] = {}
        self.entries: dict[tuple[int, int], Entries] = {}

    def open(self, stream: int, reads: tuple[int, ...], tokens: PackedTokens) -> ScratchPass:
        if stream in reads:
            self.tokens[stream] = tokens
        return ScratchPass(self, stream, reads, self.tokens[reads[0]], tokens)


class ScratchPass:
    """A pass over ``tokens``, whose queries see ``keys``."""

    def __init__(
        self,
        store: Scratch,
        stream: int,
        reads: tuple[int, ...],
        keys: PackedTokens,
        tokens: PackedTokens,
    ) -> None:
        self.store, self.stream, self.reads = store, stream, reads
        self.writes = stream in reads
        self.attention = PackedAttention(tokens, keys)
        self.own: Entries | None = None
        if len(reads) > 1:  # the pass's own entries replace those of its tokens
            self.replaced = torch.searchsorted(keys.place, tokens.place)

    def write(self, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None:
        self.own = k_MGH, v_MGH
        if self.stream in self.store.kept:
            self.store.entries[self.stream, layer] = self.own

    def attend(self, layer: int, q_MNH: Tensor) -> Tensor:
        return self.attention(q_MNH, *self._entries(layer))

    def _entries(self, layer: int) -> Entries:
        if self.reads[0] == self.stream:
            assert self.own is not None, f"stream {self.stream} was read before it was written"
            return self.own
        k_MGH, v_MGH = self.store.entries[self.reads[0], layer]
        if len(self.reads) == 1:
            return k_MGH, v_MGH
        assert self.own is not None, f"stream {self.stream} was read before it was written"
        k_own, v_own = self.own
        return k_MGH.index_copy(0, self.replaced, k_own), v_MGH.index_copy(0, self.replaced, v_own)
