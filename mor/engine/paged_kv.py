"""Keys and values of many sequences in one pool of pages, by (sequence, recursion).

A *virtual sequence* is what one running sequence has cached in one stream (stream 0: prelude and
coda, stream r: recursion r, see kv_cache.py). Its table lists where its entries lie, in order, so
attention needs the table and a number of visible entries and nothing else: no positions and no
mask, at any mixture of depths. The strategies differ in which table a recursion reads: its own;
with ``shared`` that of recursion 1; with ``hybrid`` a *view* that names, for each position, its own
entry or else that of recursion 1.

Whoever schedules takes pages ahead of time (:meth:`PagedKV.reserve`) and with them lists the places
of entries to come. What a pass then does, place, write and count its entries, are tensor operations
of static shapes.

M tokens · A rows with tokens · S slots · V streams · L longest sequence · E entries of a pool · N
heads · G key/value heads · H head dim
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mor.costs import flops as costs
from mor.engine.attention import DecodeAttention
from mor.engine.pages import PagePool, Segment
from mor.model.attention import attention
from mor.model.config import ModelConfig
from mor.model.kv_cache import _PADDED_QUERY, READS
from mor.model.packing import PackedTokens


class PagedKV:
    """Pools, tables and page accounting for ``num_slots`` running sequences of up to ``max_len``
    tokens.

    A further slot, ``idle``, belongs to nobody: passes of fixed size fill up with it, and what they
    write goes to a place that nobody reads. Raises ValueError if ``num_bytes`` does not hold a page
    of each kind.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        max_len: int,
        page_size: int,
        num_bytes: int,
        decode_attention: DecodeAttention,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.page_size, self.max_len = config, page_size, max_len
        self.num_slots, self.idle, self.num_streams = (
            num_slots,
            num_slots,
            config.num_recursions + 1,
        )
        self.device, self.decode_attention = torch.device(device), decode_attention
        reads = [(0,), *(READS[config.kv_strategy](r) for r in range(1, self.num_streams))]
        self.writes = np.array([stream in r for stream, r in enumerate(reads)])
        self.writes_V = torch.tensor(self.writes, device=device)
        # Whether the reader of a stream sees its own entries alone, and so as many as there are up
        # to its token's; else it sees an entry of every token up to its own.
        self.compact_V = torch.tensor(
            [r == (stream,) for stream, r in enumerate(reads)], device=device
        )
        self.read_V = torch.tensor([r[-1] for r in reads], device=device)  # whose view it reads
        self.all_write, self.all_compact = bool(self.writes.all()), bool(self.compact_V.all())

        layers = (config.prelude_layers + config.coda_layers, config.shared_layers)
        self.page_bytes = [
            n * page_size * costs.kv_entry_bytes(config, dtype.itemsize) for n in layers
        ]
        self.pools = [PagePool(n) for n in self._num_pages(num_slots, num_bytes)]
        shape = (config.num_kv_heads, config.head_dim)
        # Zeros and not empty: what no query sees is still multiplied, by zero.
        self.k, self.v = (
            [
                [
                    torch.zeros(
                        (pool.num_pages + 1) * page_size, *shape, device=device, dtype=dtype
                    )
                    for _ in range(n)
                ]
                for pool, n in zip(self.pools, layers, strict=True)
            ]
            for _ in range(2)
        )
        places = [pool.num_pages * page_size for pool in self.pools]  # that nobody reads
        self.unread_V = torch.tensor(
            [places[min(stream, 1)] for stream in range(self.num_streams)], device=device
        )
        rows, width = (num_slots + 1) * self.num_streams, max_len + page_size
        self.table_RL = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self.view_RL = self.table_RL.clone() if config.kv_strategy == "hybrid" else self.table_RL
        self.table_RL.view(-1, self.num_streams, width)[self.idle] = self.unread_V[:, None].int()
        self.count_R = torch.zeros(rows, dtype=torch.int64, device=device)
        # What the scheduler knows: entries of each virtual sequence, and those that have places.
        self.count = np.zeros((num_slots + 1, self.num_streams), dtype=np.int64)
        if self.device.type == "cpu":
            self.count = self.count_R.numpy().reshape(self.count.shape)
        self.reserved = np.zeros_like(self.count)
        self.pages: list[list[list[int]]] = [
            [[] for _ in range(self.num_streams)] for _ in range(num_slots)
        ]

    def _num_pages(self, num_slots: int, num_bytes: int) -> list[int]:
        """Pages of each kind: the budget, shared out as a mean token uses it, but no more than can
        be used."""
        shares = [
            c for c, writes in zip(self.config.capacities, self.writes[1:], strict=True) if writes
        ]
        writing = [float(self.writes[0]), sum(shares)]
        token_bytes = sum(w * b for w, b in zip(writing, self.page_bytes, strict=True))
        most = num_slots * -(-self.max_len // self.page_size)
        mean = [
            int(num_bytes / token_bytes * w) if b else 0
            for w, b in zip(writing, self.page_bytes, strict=True)
        ]
        limits = [most, most * int(self.writes[1:].sum())]
        pages = [min(n, limit) for n, limit in zip(mean, limits, strict=True)]
        # what the first pool cannot use goes to the second
        if self.page_bytes[0] and pages[0] == limits[0]:
            pages[1] = min(
                limits[1], (num_bytes - pages[0] * self.page_bytes[0]) // self.page_bytes[1]
            )
        if any(b and n < 1 for n, b in zip(pages, self.page_bytes, strict=True)):
            raise ValueError(
                f"kv_cache_memory={num_bytes} bytes holds no page of each kind ({self.page_bytes} "
                "bytes); "
                f"give at least {int(token_bytes) + sum(self.page_bytes)}"
            )
        return pages

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(pool.num_pages * b for pool, b in zip(self.pools, self.page_bytes, strict=True))

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that have an owner."""
        return sum(
            (p.num_pages - p.num_free) * b for p, b in zip(self.pools, self.page_bytes, strict=True)
        )

    def pages_for(self, tokens: int | np.ndarray, slots: Sequence[int] | None = None) -> list[int]:
        """Pages of each kind that ``tokens`` more tokens take at most, if each takes every
        recursion: of one new sequence, or of each of these slots (then ``tokens`` may differ: one
        row for each)."""
        free = np.zeros((1, self.num_streams), dtype=np.int64)
        if slots is not None:
            free = (self.reserved - self.count)[list(slots)]
        pages = -(-np.maximum(tokens - free, 0) // self.page_size) * self.writes
        return [int(pages[:, 0].sum()) if self.page_bytes[0] else 0, int(pages[:, 1:].sum())]

    def pages_for_entry(self, slot_M: np.ndarray, stream_M: np.ndarray) -> list[int]:
        """Pages of each kind that one more entry in each of these virtual sequences takes."""
        full = (self.reserved == self.count)[slot_M, stream_M] & self.writes[stream_M]
        return [
            int((full & (stream_M == 0)).sum()) if self.page_bytes[0] else 0,
            int((full & (stream_M > 0)).sum()),
        ]

    def has_free(self, pages: Sequence[int]) -> bool:
        return all(pool.num_free >= n for pool, n in zip(self.pools, pages, strict=True))

    def free_slot(self, slot: int) -> None:
        """Forget a sequence; pages without another owner are free again."""
        for stream, pages in enumerate(self.pages[slot]):
            for page in pages:
                self.pools[min(stream, 1)].release(page)
            pages.clear()
        self.reserved[slot] = self.count[slot] = 0
        self.count_R[slot * self.num_streams : (slot + 1) * self.num_streams] = 0

    def refresh(self) -> None:
        """Learn what the device counted."""
        if self.device.type != "cpu":
            self.count[:] = self.count_R.view(self.count.shape).cpu().numpy()

    def reserve(
        self, slot_M: np.ndarray, stream_M: np.ndarray, entries: int | np.ndarray = 1
    ) -> None:
        """Places for so many more entries of each virtual sequence. Needs free pages: callers make
        room first."""
        missing_M = (
            self.count[slot_M, stream_M] + entries - self.reserved[slot_M, stream_M]
        ) * self.writes[stream_M]
        for i in np.flatnonzero(missing_M > 0):
            for _ in range(-(-int(missing_M[i]) // self.page_size)):
                self._new_page(int(slot_M[i]), int(stream_M[i]))

    def _new_page(self, slot: int, stream: int) -> None:
        kind, start = min(stream, 1), int(self.reserved[slot, stream])
        page = 0
        if self.page_bytes[kind]:
            page = self.pools[kind].allocate()
            self.pages[slot][stream].append(page)
        places = torch.arange(page * self.page_size, (page + 1) * self.page_size, dtype=torch.int32)
        self.table_RL[slot * self.num_streams + stream, start : start + self.page_size] = places.to(
            self.device
        )
        self.reserved[slot, stream] += self.page_size

    def append(
        self,
        slot_M: Tensor,
        stream_M: Tensor,
        position_M: Tensor,
        new_M: Tensor,
        *,
        kind: int,
        longest: int | None = None,
    ) -> LanePass:
        """A pass over one token of each of several sequences, at any mixture of depths; places are
        reserved.

        new_M: whether the token gets an entry now; it has one if it was in its stream before. kind:
        0 for layers of their own, 1 for shared ones. longest: entries that any token sees at most;
        if it is given, nothing is looked up on the device.
        """
        row_M, counted_M, writes = (
            slot_M * self.num_streams + stream_M,
            new_M & (slot_M != self.idle),
            True,
        )
        if not self.all_write:
            writes_M = self.writes_V[stream_M]
            counted_M, writes = counted_M & writes_M, longest is not None or bool(writes_M.any())
        self.count_R.index_add_(0, row_M, counted_M.long())
        index_M = (self.count_R[row_M] - 1).clamp(min=0)
        place_M, view_M, seen_M = self.table_RL[row_M, index_M].long(), row_M, index_M + 1
        if not self.all_write:
            place_M = torch.where(writes_M, place_M, self.unread_V[stream_M])
        if not self.all_compact:
            view_M = slot_M * self.num_streams + self.read_V[stream_M]
            seen_M = torch.where(self.compact_V[stream_M], index_M, position_M) + 1
        if self.view_RL is not self.table_RL:
            self._look_at(slot_M, stream_M, position_M, place_M)
        return LanePass(self, kind, writes, place_M, view_M, seen_M, longest or int(seen_M.max()))

    def _look_at(
        self, slot_M: Tensor, stream_M: Tensor, position_M: Tensor, place_M: Tensor
    ) -> None:
        """Enter new entries into the views (hybrid): those of recursion 1 into all, later ones into
        their own."""
        for stream in range(self.num_streams):
            seeing_M = (stream_M == stream) | ((stream_M == 1) & (stream > 1))
            row_M = torch.where(seeing_M, slot_M, self.idle) * self.num_streams + stream
            self.view_RL[row_M, position_M] = torch.where(
                seeing_M, place_M, self.unread_V[stream]
            ).int()

    def append_chunk(
        self, slot_M: Tensor, stream: int, tokens: PackedTokens
    ) -> tuple[Tensor, Tensor]:
        """Consecutive entries of several virtual sequences: (place of each, entries that each token
        may see)."""
        row_M = slot_M * self.num_streams + stream
        if not self.writes[stream]:
            return self.unread_V[stream].expand(len(row_M)), tokens.position_M + 1
        index_M = self.count_R[row_M] + tokens.slot_M
        place_M = self.table_RL[row_M, index_M].long()
        self.count_R.index_add_(0, row_M, torch.ones_like(row_M))
        if self.view_RL is not self.table_RL:
            self._look_at(slot_M, torch.full_like(slot_M, stream), tokens.position_M, place_M)
        return place_M, torch.where(self.compact_V[stream], index_M, tokens.position_M) + 1

    def segment(self, slot: int, start: int, taken: np.ndarray, skipped: np.ndarray) -> Segment:
        """What a sequence has cached of the tokens from position ``start`` on, for the prefix
        cache.

        taken: (tokens, R) whether they took each recursion; skipped: (R,) how many earlier ones
        did.
        """
        entries: list[np.ndarray] = []
        table = self.table_RL.view(-1, self.num_streams, self.table_RL.shape[1])[slot]
        for stream in range(self.num_streams):
            begin, length = start, len(taken)
            if stream:
                begin, length = (
                    int(skipped[stream - 1]),
                    int(taken[:, stream - 1].sum()) * int(self.writes[stream]),
                )
            entries.append(table[stream, begin : begin + length].cpu().numpy().copy())
        pages = set()
        for stream, places in enumerate(entries):
            kind = min(stream, 1)
            if self.page_bytes[kind]:
                pages |= {(kind, int(page)) for page in np.unique(places // self.page_size)}
        for kind, page in pages:
            self.pools[kind].share(page)
        return Segment(entries, sorted(pages), taken)

    def attach(self, slot: int, segments: Sequence[Segment]) -> None:
        """Begin a sequence with cached segments; what follows goes to pages of its own."""
        held: set[tuple[int, int]] = set()
        position = 0
        for segment in segments:
            for stream, places in enumerate(segment.entries):
                self._adopt(
                    slot, stream, torch.from_numpy(places).to(self.device), segment.taken, position
                )
            held |= set(segment.pages)
            position += len(segment.taken)
        self.count_R.view(self.count.shape)[slot] = torch.from_numpy(self.reserved[slot]).to(
            self.device
        )
        self.count[slot] = self.reserved[slot]
        for kind, page in sorted(held):
            self.pools[kind].share(page)
            # any stream of that kind: it is released with the slot
            self.pages[slot][kind].append(page)

    def _adopt(
        self, slot: int, stream: int, place_K: Tensor, taken: np.ndarray, position: int
    ) -> None:
        start, row = int(self.reserved[slot, stream]), slot * self.num_streams + stream
        self.table_RL[row, start : start + len(place_K)] = place_K
        self.reserved[slot, stream] += len(place_K)
        if self.view_RL is not self.table_RL:
            took = np.ones(len(taken), dtype=bool) if stream == 0 else taken[:, stream - 1]
            position_K = torch.from_numpy(np.flatnonzero(took) + position).to(self.device)
            slot_K = torch.full_like(position_K, slot)
            self._look_at(slot_K, torch.full_like(slot_K, stream), position_K, place_K)

    def release(self, segment: Segment) -> None:
        """The prefix cache forgets a segment."""
        for kind, page in segment.pages:
            self.pools[kind].release(page)


class LanePass:
    """A pass over one token of each of several sequences: where its entries go and what it sees."""

    def __init__(
        self,
        kv: PagedKV,
        kind: int,
        writes: bool,
        place_M: Tensor,
        view_M: Tensor,
        seen_M: Tensor,
        longest: int,
    ) -> None:
        self.kv, self.kind, self.writes, self.place_M, self.longest = (
            kv,
            kind,
            writes,
            place_M,
            longest,
        )
        self.view_M, self.seen_M = view_M.int(), seen_M.int()

    def write(self, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None:
        self.kv.k[self.kind][layer].index_copy_(0, self.place_M, k_MGH)
        self.kv.v[self.kind][layer].index_copy_(0, self.place_M, v_MGH)

    def attend(self, layer: int, q_MNH: Tensor) -> Tensor:
        k_EGH, v_EGH = self.kv.k[self.kind][layer], self.kv.v[self.kind][layer]
        return self.kv.decode_attention(
            q_MNH, k_EGH, v_EGH, self.kv.view_RL, self.view_M, self.seen_M, longest=self.longest
        )


class ChunkPass:
    """A pass over several consecutive tokens of each of several sequences, all at one depth
    (prefill)."""

    def __init__(self, kv: PagedKV, slots: Tensor, stream: int, tokens: PackedTokens) -> None:
        self.kv, self.kind, self.tokens = kv, min(stream, 1), tokens
        self.writes = bool(kv.writes[stream])
        self.place_M, seen_M = kv.append_chunk(slots[tokens.row_M], stream, tokens)
        rows_A = slots if tokens.rows is None else slots[tokens.rows]
        self.entry_AS = kv.view_RL[rows_A * kv.num_streams + int(kv.read_V[stream])][
            :, : int(seen_M.max())
        ]
        seen_AK = tokens.pad(seen_M, fill=_PADDED_QUERY)
        self.visible_AKS = (
            torch.arange(self.entry_AS.shape[1], device=kv.device) < seen_AK[:, :, None]
        )

    def write(self, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None:
        self.kv.k[self.kind][layer].index_copy_(0, self.place_M, k_MGH)
        self.kv.v[self.kind][layer].index_copy_(0, self.place_M, v_MGH)

    def attend(self, layer: int, q_MNH: Tensor) -> Tensor:
        k, v = (
            pool[self.kind][layer]
            .index_select(0, self.entry_AS.flatten())
            .unflatten(0, self.entry_AS.shape)
            for pool in (self.kv.k, self.kv.v)
        )
        return self.tokens.unpad(attention(self.tokens.pad(q_MNH), k, v, self.visible_AKS))


class PagedBatch:
    """Some running sequences as the cache of an ordinary forward: row i of the batch is slot
    ``slots[i]``."""

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
            made: LanePass | ChunkPass = ChunkPass(self.kv, self.slots_B, stream, tokens)
        else:
            stream_M = torch.full_like(tokens.row_M, stream)
            new_M = torch.ones_like(stream_M, dtype=torch.bool)
            slot_M = self.slots_B[tokens.row_M]
            made = self.kv.append(slot_M, stream_M, tokens.position_M, new_M, kind=min(stream, 1))
        self.kv.refresh()
        return made
