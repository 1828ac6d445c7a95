"""Keys and values by recursion.

Entries live in *streams*: stream 0 holds every token's entries for prelude and coda, stream r >= 1
holds those of the tokens that took recursion r, stream LEFT those that tokens make of the state
with which they leave. An entry remembers its token's position; a query sees the entries at or
before its own position. A strategy is the list of streams that recursion r reads, later ones
replacing earlier ones at the same position; r writes its own stream only if it reads it. That is
all there is to the four strategies.

B rows · A rows with tokens · S entries · M tokens · N heads · G key/value heads · H head dim · K
selected tokens
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mor.model.attention import as_bias, attention
from mor.model.config import ModelConfig
from mor.model.packing import PackedTokens

EMPTY = torch.iinfo(torch.int64).max  # position of a place without an entry: after every query
_PADDED_QUERY = EMPTY - 1  # sees every entry, so that its (unused) softmax is finite

LEFT = -1
"""The stream of tokens that left."""

READS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "recursion_wise": lambda r: (r,),
    "shared": lambda r: (min(r, 1),),
    "hybrid": lambda r: (1, r) if r > 1 else (r,),
    "final": lambda r: (LEFT, r) if r > 1 else (r,),
}


class AttentionPass(Protocol):
    """One pass of some layers over some tokens: where its attention writes and what it sees."""

    writes: bool

    def write(self, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None: ...

    def attend(self, layer: int, q_MNH: Tensor) -> Tensor:
        """Attention of the pass's tokens over all entries they may see, (M, N, H)."""


class KVStore(Protocol):
    """Where a forward keeps keys and values."""

    def open(self, stream: int, reads: tuple[int, ...], tokens: PackedTokens) -> AttentionPass: ...


class Cache(KVStore, Protocol):
    """A store that outlives a forward. length: tokens that each of ``batch`` sequences holds."""

    batch: int

    @property
    def length(self) -> Tensor: ...


def check_fits(cache: Cache, config: ModelConfig, rows: int, weight: Tensor) -> None:
    """Raise ValueError if a cache is not one for ``rows`` sequences and a model of this config, on
    the device and in the precision of this weight."""
    if cache.batch != rows:
        raise ValueError(f"the cache holds {cache.batch} sequences, the batch has {rows}")
    if not isinstance(cache, KVCache):
        return
    if cache.config != config:
        ours, theirs = config.to_dict(), cache.config.to_dict()
        other = ", ".join(name for name in ours if theirs[name] != ours[name])
        raise ValueError(
            f"the cache was made for a model of other settings ({other}); make a new one"
        )
    has, needs = (cache.length.device, cache.dtype), (weight.device, weight.dtype)
    if has != needs:
        raise ValueError(
            f"the cache is on {has[0]} in {has[1]}, the model on {needs[0]} in {needs[1]}; make "
            "it with the model's device and dtype"
        )


class KVPass:
    """A pass over ``tokens``, the entries of each row side by side."""

    def __init__(
        self, store: KVCache, stream: int, reads: tuple[int, ...], tokens: PackedTokens
    ) -> None:
        self.store, self.stream, self.reads, self.tokens = store, stream, reads, tokens
        self.writes = stream in reads
        was_empty = self.writes and store.begin(stream, tokens)
        self.mask_AKS: Tensor | None = (
            None  # causal: the pass sees exactly its own tokens, in order
        )
        if not (was_empty and reads == (stream,)):
            key_AS = store.positions(reads[0], tokens.rows)
            if len(reads) > 1:
                key_AS = self._merge(tokens)
            query_AK = tokens.pad(tokens.position, fill=_PADDED_QUERY)
            self.mask_AKS = key_AS[:, None, :] <= query_AK[:, :, None]

    def _merge(self, tokens: PackedTokens) -> Tensor:
        """Where each entry of several streams goes, so that a key's slot is its position; returns
        the positions of the keys there are."""
        self._places = []
        for stream in self.reads:
            position_AS = self.store.positions(stream, tokens.rows)
            lane, slot = (position_AS != EMPTY).nonzero(as_tuple=True)
            self._places.append((lane, slot, position_AS[lane, slot]))
        width = 1 + max(int(position.max()) for _, _, position in self._places if len(position))
        key_AS = torch.full((len(position_AS), width), EMPTY, device=position_AS.device)
        for lane, _, position in self._places:
            key_AS[lane, position] = position
        return key_AS

    def write(self, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None:
        self.store.write(self.stream, layer, k_MGH, v_MGH)

    def attend(self, layer: int, q_MNH: Tensor) -> Tensor:
        k, v = self._entries(layer)
        if self.mask_AKS is not None and self.mask_AKS.dtype == torch.bool:
            # Once for all layers: the kernel would make a copy for each, and keep it for backward.
            self.mask_AKS = as_bias(self.mask_AKS, q_MNH.dtype)
        return self.tokens.unpad(attention(self.tokens.pad(q_MNH), k, v, self.mask_AKS))

    def _entries(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v = self.store.read(self.reads[-1], layer, self.tokens.rows)
        if len(self.reads) == 1:
            return k, v
        assert self.mask_AKS is not None
        shape = (len(k), self.mask_AKS.shape[-1], *k.shape[2:])
        merged = k.new_zeros(shape), v.new_zeros(shape)
        for stream, (lane, slot, position) in zip(self.reads, self._places, strict=True):
            for into, x in zip(
                merged, self.store.read(stream, layer, self.tokens.rows), strict=True
            ):
                into[lane, position] = x[lane, slot]
        return merged


@dataclass
class _Stream:
    length: Tensor
    position_BS: Tensor
    k: list[Tensor] = field(default_factory=list)  # one (B, S, G, H) per layer
    v: list[Tensor] = field(default_factory=list)
    place: tuple[Tensor, Tensor] | None = None  # (row, slot) of the tokens being written

    def sort(self) -> None:
        """Bring entries into the order of their positions, those that are gone to the end."""
        self.position_BS, order_BS = self.position_BS.sort(1)
        row_B1 = torch.arange(len(order_BS), device=order_BS.device)[:, None]
        self.k, self.v = ([t[row_B1, order_BS] for t in each] for each in (self.k, self.v))

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a pickle hold: the entries, without the graph that they came from."""
        k, v = ([t.detach() for t in entries] for entries in (self.k, self.v))
        return self.__dict__ | {"k": k, "v": v, "place": None}


class KVCache:
    """Keys and values of ``batch`` sequences; grows as it is written.

    ``Transformer.forward(cache=...)`` appends to it. Rows may have different lengths.
    """

    GROWTH = 64  # entries added at a time

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        *,
        num_recursions: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """num_recursions: with a router that goes on after the trained ones; None: the trained."""
        if batch < 1:
            raise ValueError(f"a cache needs at least one sequence, got batch={batch}")
        reads = READS[config.kv_strategy]
        entry = (batch, 0, config.num_kv_heads, config.head_dim)
        self.config, self.batch, self.dtype = config, batch, dtype
        self.num_recursions = num_recursions or config.num_recursions

        def empty(layers: int) -> _Stream:
            return _Stream(
                torch.zeros(batch, dtype=torch.int64, device=device),
                torch.full((batch, 0), EMPTY, device=device),
                [torch.zeros(entry, device=device, dtype=dtype) for _ in range(layers)],
                [torch.zeros(entry, device=device, dtype=dtype) for _ in range(layers)],
            )

        self.streams = [empty(config.prelude_layers + config.coda_layers)]
        for stream in range(1, self.num_recursions + 1):
            self.streams.append(empty(config.shared_layers if stream in reads(stream) else 0))
        if LEFT in reads(2):  # the last one, so that it lies at LEFT
            self.streams.append(empty(config.shared_layers))

    @property
    def length(self) -> Tensor:
        """Tokens that each sequence holds."""
        return self.streams[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values stored, without the room kept for growth."""
        total = 0
        for stream in self.streams:
            per_entry = (
                sum(t[0, 0].nbytes for t in (*stream.k, *stream.v))
                if stream.position_BS.shape[1]
                else 0
            )
            total += int(stream.length.sum()) * per_entry
        return total

    @property
    def allocated_nbytes(self) -> int:
        return sum(t.nbytes for stream in self.streams for t in (*stream.k, *stream.v))

    def open(self, stream: int, reads: tuple[int, ...], tokens: PackedTokens) -> KVPass:
        if stream > self.num_recursions:
            raise ValueError(
                f"the cache was made for {self.num_recursions} recursions, but the router has "
                f"more; make it with num_recursions={stream} or more"
            )
        return KVPass(self, stream, reads, tokens)

    def begin(self, stream: int, tokens: PackedTokens) -> bool:
        s = self.streams[stream]
        was_empty = not bool(s.length.any())
        slot = s.length[tokens.row] + tokens.rank
        s.length = s.length + tokens.count
        self._make_room(s, int(s.length.max()))
        s.position_BS[tokens.row, slot] = tokens.position
        s.place = tokens.row, slot
        return was_empty

    def write(self, stream: int, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None:
        s = self.streams[stream]
        # Under autocast the layers give another precision than the cache was made for.
        s.k[layer][s.place] = k_MGH.to(s.k[layer].dtype)
        s.v[layer][s.place] = v_MGH.to(s.v[layer].dtype)

    def read(self, stream: int, layer: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        s = self.streams[stream]
        return self._lines(s, s.k[layer], rows), self._lines(s, s.v[layer], rows)

    def positions(self, stream: int, rows: Tensor | None) -> Tensor:
        s = self.streams[stream]
        return self._lines(s, s.position_BS, rows)

    def truncate(self, length: int | Tensor) -> None:
        """Forget tokens from position ``length`` on: one number for all rows, or one each, (B,).

        Raises ValueError for a length below 0.
        """
        if torch.as_tensor(length).lt(0).any():
            raise ValueError(f"a cache keeps 0 tokens or more, got length={length}")
        limit = length[:, None] if isinstance(length, Tensor) else length
        for s in self.streams:
            s.length = (s.position_BS < limit).sum(1)
            s.position_BS = s.position_BS.masked_fill(s.position_BS >= limit, EMPTY)
            if s is self.streams[LEFT]:  # tokens leave in another order than they stand in
                s.sort()

    def select_rows(self, rows: Tensor) -> None:
        """Keep, reorder or repeat sequences: row i becomes what row ``rows[i]`` was.

        Raises ValueError for a mask in place of row numbers.
        """
        if rows.dtype == torch.bool:
            raise ValueError("rows are numbers of rows; of a mask, take mask.nonzero()[:, 0]")
        self.batch = rows.numel()
        for s in self.streams:
            s.length, s.position_BS = s.length[rows], s.position_BS[rows]
            s.k, s.v = [t[rows] for t in s.k], [t[rows] for t in s.v]

    def _make_room(self, s: _Stream, needed: int) -> None:
        have = s.position_BS.shape[1]
        if needed <= have:
            return
        more = -(-(needed - have) // self.GROWTH) * self.GROWTH
        s.position_BS = torch.cat(
            [s.position_BS, s.position_BS.new_full((self.batch, more), EMPTY)], dim=1
        )
        s.k = [torch.cat([t, t.new_zeros(self.batch, more, *t.shape[2:])], dim=1) for t in s.k]
        s.v = [torch.cat([t, t.new_zeros(self.batch, more, *t.shape[2:])], dim=1) for t in s.v]

    @staticmethod
    def _lines(s: _Stream, x_BS: Tensor, rows: Tensor | None) -> Tensor:
        used = x_BS[:, : int(s.length.max())]
        return used if rows is None else used[rows]
