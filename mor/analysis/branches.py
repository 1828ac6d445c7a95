"""Counterfactual depth: what a token would have predicted had it left after another number of
recursions.

Only that token's depth changes; the tokens before it are as they were. :func:`exits_plain` is the
definition, one run of the whole sequence per token and depth. :func:`exits` runs all tokens of one
depth at once: each is a row of one token that reads the sequence's cached entries before it, and
its own new ones.

T tokens · M tokens of a pass · S cached entries · R recursions · N heads · G key/value heads · H
head dim · V vocab · B rows of the batch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mor.model.attention import attention
from mor.model.kv_cache import EMPTY, KVCache
from mor.model.other_depths import ForcedRouter
from mor.model.packing import PackedTokens
from mor.model.transformer import Transformer

# Logits alive at a time; four times as many cost more in the kernel than they save.
CHUNK_LOGITS = 1 << 22


def at_depth(taken_RM: Tensor, depth: int) -> Tensor:
    """The table in which every token takes ``depth`` recursions: first those it took, in order,
    then the earliest of the others. Where tokens drop out for good these are simply the first
    ``depth``. Depth 0 is one, too, where models may leave tokens out of every recursion."""
    order_RM = (~taken_RM).to(torch.int8).argsort(dim=0, stable=True)
    rank_RM = order_RM.argsort(dim=0)
    return rank_RM < depth


@torch.no_grad()
def exits_plain(model: Transformer, ids: list[int], taken_RM: Tensor, depth: int) -> Tensor:
    """Logits after each token if it alone took ``depth`` recursions, (T, V): one run per token."""
    tokens_1T = torch.tensor([ids], device=model.embedding.weight.device)
    forced_RM, rows = at_depth(taken_RM, depth), []
    for t in range(len(ids)):
        table_RM = taken_RM.clone()
        table_RM[:, t] = forced_RM[:, t]
        forced = ForcedRouter(model.router, table_RM)
        rows.append(model(tokens_1T, router=forced).logits_BTV[0, t])
    return torch.stack(rows)


@torch.no_grad()
def exits(
    model: Transformer,
    ids: list[int],
    taken_RM: Tensor,
    depth: int,
    cache: KVCache,
    *,
    places: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """The same for the tokens at these places (None: all), in chunks of them, (chunk, V). cache:
    that of the run which ``taken_RM`` is from."""
    device = model.embedding.weight.device
    forced_RT = at_depth(taken_RM, depth)
    size = max(1, CHUNK_LOGITS // model.config.vocab_size)
    places = range(len(ids)) if places is None else places
    for start in range(0, len(places), size):
        position = torch.tensor(places[start : start + size], device=device)
        forced = ForcedRouter(model.router, forced_RT[:, position])
        tokens_M1 = torch.tensor([ids[t] for t in position], device=device)[:, None]
        own = Branches(cache, position)
        yield model(tokens_M1, cache=own, router=forced, logits="last").logits_BTV[:, 0]


class Branches:
    """A cache whose rows are tokens of one sequence: each sees the entries before its position, and
    its own.

    Nothing is added to ``past``, which holds that sequence. position: the place of each row's
    token in it.
    """

    def __init__(self, past: KVCache, position: Tensor) -> None:
        self.past, self.length, self.batch = past, position, len(position)
        self.own: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def open(self, stream: int, reads: tuple[int, ...], tokens: PackedTokens) -> BranchPass:
        return BranchPass(self, stream, reads, tokens)


class BranchPass:
    """One pass: all rows are queries of a single attention, over the entries of the past and one
    own entry each."""

    def __init__(
        self, store: Branches, stream: int, reads: tuple[int, ...], tokens: PackedTokens
    ) -> None:
        self.store, self.reads, self.row = store, reads, tokens.row
        self.writes = stream in reads
        self.stream = stream if self.writes else reads[-1]  # where the own entries are
        past_MS = self._past_positions() < tokens.position[:, None]
        own_MM = torch.eye(len(tokens), dtype=torch.bool, device=past_MS.device)
        self.visible_1MS = torch.cat([past_MS, own_MM], dim=1)[None]

    def write(self, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None:
        shape = (self.store.batch, *k_MGH.shape[1:])
        self.store.own[self.stream, layer] = (
            k_MGH.new_zeros(shape).index_copy(0, self.row, k_MGH),
            v_MGH.new_zeros(shape).index_copy(0, self.row, v_MGH),
        )

    def attend(self, layer: int, q_MNH: Tensor) -> Tensor:
        own = self.store.own[self.stream, layer]
        k, v = (
            torch.cat([past, mine[self.row]])[None]
            for past, mine in zip(self._past(layer), own, strict=True)
        )
        return attention(q_MNH[None], k, v, self.visible_1MS)[0]

    def _past_positions(self) -> Tensor:
        """(1, S); of several streams, merged so that an entry's place is its position."""
        positions = [self.store.past.positions(stream, None) for stream in self.reads]
        if len(positions) == 1:
            return positions[0]
        merged = positions[0].new_full((1, int(self.store.past.length)), EMPTY)
        for position_1S in positions:
            merged[0, position_1S[0]] = position_1S[0]
        return merged

    def _past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Entries of the streams read, (S, G, H); later streams win."""
        past = self.store.past
        k, v = (x[0] for x in past.read(self.reads[-1], layer, None))
        if len(self.reads) == 1:
            return k, v
        shape = (int(past.length), *k.shape[1:])
        merged = k.new_zeros(shape), v.new_zeros(shape)
        for stream in self.reads:
            position = past.positions(stream, None)[0]
            for into, x in zip(merged, past.read(stream, layer, None), strict=True):
                into[position] = x[0]
        return merged
