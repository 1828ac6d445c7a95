"""Keys and values of many sequences in one pool of pages, by (sequence, recursion).

A *virtual sequence* is what one running sequence has cached in one stream (stream 0: prelude and coda,
stream r: recursion r, see kv_cache.py). Its table lists where its entries lie, in order, so attention needs
the table and a number of visible entries and nothing else: no positions and no mask, at any mixture of
depths. The strategies differ in what the tables say: with ``shared`` every recursion reads table 1; with
``hybrid`` the table of recursion r names, for each position, the entry of r or else that of recursion 1.

M tokens · A rows with tokens · E entries of a pool · L longest sequence · N heads · G key/value heads · H head dim
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mor import costs
from mor.attention import attention
from mor.config import ModelConfig
from mor.engine.attention import DecodeAttention
from mor.engine.block_manager import PagePool, Segment
from mor.kv_cache import _PADDED_QUERY, READS
from mor.packing import PackedTokens


class PagedKV:
    """Pools, tables and page accounting for ``num_slots`` running sequences of up to ``max_len`` tokens.

    Raises ValueError if ``num_bytes`` does not hold a page of each kind.
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
        self.num_streams = config.num_recursions + 1
        reads = [(0,), *(READS[config.kv_strategy](r) for r in range(1, self.num_streams))]
        self.read_stream = np.array([r[-1] for r in reads])
        self.writes = np.array([stream in r for stream, r in enumerate(reads)])
        self.overlaid = config.kv_strategy == "hybrid"
        self.by_count = config.kv_strategy == "recursion_wise"

        layers = (config.prelude_layers + config.coda_layers, config.shared_layers)
        self.page_bytes = [n * page_size * costs.kv_entry_bytes(config, dtype.itemsize) for n in layers]
        self.pools = [PagePool(n) for n in self._num_pages(num_slots, num_bytes)]
        shape = (config.num_kv_heads, config.head_dim)
        # Zeros and not empty: what no query sees is still multiplied, by zero.
        self.k, self.v = (
            [
                [torch.zeros(pool.num_pages * page_size, *shape, device=device, dtype=dtype) for _ in range(n)]
                for pool, n in zip(self.pools, layers, strict=True)
            ]
            for _ in range(2)
        )
        self.decode_attention = decode_attention
        self.device = torch.device(device)
        self.table = np.zeros((num_slots, self.num_streams, max_len), dtype=np.int32)
        self.table_EL = torch.from_numpy(self.table.reshape(-1, max_len)).to(device)
        counters = (num_slots, self.num_streams)
        self.count = np.zeros(counters, dtype=np.int64)  # entries of each virtual sequence
        self.next_place = np.zeros(counters, dtype=np.int64)  # where its next entry goes
        self.left = np.zeros(counters, dtype=np.int64)  # free places in its last page
        self.place = np.zeros(counters, dtype=np.int64)  # its newest entry
        self.seen = np.zeros(counters, dtype=np.int64)  # entries that its newest token may see
        self.pages: list[list[list[int]]] = [[[] for _ in range(self.num_streams)] for _ in range(num_slots)]

    def _num_pages(self, num_slots: int, num_bytes: int) -> list[int]:
        """Pages of each kind: the budget, shared out as a mean token uses it, but no more than can be used."""
        shares = [c for c, writes in zip(self.config.capacities, self.writes[1:], strict=True) if writes]
        writing = [float(self.writes[0]), sum(shares)]
        token_bytes = sum(w * b for w, b in zip(writing, self.page_bytes, strict=True))
        most = num_slots * -(-self.max_len // self.page_size)
        mean = [int(num_bytes / token_bytes * w) if b else 0 for w, b in zip(writing, self.page_bytes, strict=True)]
        limits = [most, most * int(self.writes[1:].sum())]
        pages = [min(n, limit) for n, limit in zip(mean, limits, strict=True)]
        if self.page_bytes[0] and pages[0] == limits[0]:  # what the first pool cannot use goes to the second
            pages[1] = min(limits[1], (num_bytes - pages[0] * self.page_bytes[0]) // self.page_bytes[1])
        if any(b and n < 1 for n, b in zip(pages, self.page_bytes, strict=True)):
            raise ValueError(
                f"kv_cache_memory={num_bytes} bytes holds no page of each kind ({self.page_bytes} bytes); "
                f"give at least {int(token_bytes) + sum(self.page_bytes)}"
            )
        return pages

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for kind in (*self.k, *self.v) for t in kind)

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that have an owner."""
        return sum((p.num_pages - p.num_free) * b for p, b in zip(self.pools, self.page_bytes, strict=True))

    def pages_for(self, tokens: int, *, slot: int | None = None) -> list[int]:
        """Pages of each kind that ``tokens`` more tokens take at most, if each takes every recursion."""
        free = self.left[slot] if slot is not None else np.zeros(self.num_streams, dtype=np.int64)
        pages = -(-np.maximum(tokens - free, 0) // self.page_size) * self.writes
        return [int(pages[0]) if self.page_bytes[0] else 0, int(pages[1:].sum())]

    def pages_for_step(self, slot_M: np.ndarray, stream_M: np.ndarray) -> list[int]:
        """Pages of each kind that one more entry in each of these virtual sequences takes."""
        full = (self.left[slot_M, stream_M] == 0) & self.writes[stream_M]
        return [int((full & (stream_M == 0)).sum()) if self.page_bytes[0] else 0, int((full & (stream_M > 0)).sum())]

    def has_free(self, pages: Sequence[int]) -> bool:
        return all(pool.num_free >= n for pool, n in zip(self.pools, pages, strict=True))

    def free_slot(self, slot: int) -> None:
        """Forget a sequence; pages without another owner are free again."""
        for stream, pages in enumerate(self.pages[slot]):
            for page in pages:
                self.pools[min(stream, 1)].release(page)
            pages.clear()
        self.count[slot] = self.left[slot] = 0

    def append(self, slot_M: np.ndarray, stream_M: np.ndarray, position_M: np.ndarray) -> None:
        """Give each token a place in a virtual sequence of its own (decoding: one token per sequence)."""
        writing = self.writes[stream_M]
        slot_W, stream_W, position_W = slot_M[writing], stream_M[writing], position_M[writing]
        for i in np.flatnonzero(self.left[slot_W, stream_W] == 0):
            self._new_page(slot_W[i], stream_W[i])
        place_W = self.next_place[slot_W, stream_W]
        self.next_place[slot_W, stream_W] += 1
        self.left[slot_W, stream_W] -= 1
        self._list(slot_W, stream_W, position_W, place_W, self.count[slot_W, stream_W])
        self.count[slot_W, stream_W] += 1
        self.place[slot_W, stream_W] = place_W
        self.seen[slot_M, stream_M] = self._seen(slot_M, stream_M, position_M)

    def append_chunk(self, slot: int, stream: int, position_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places for consecutive entries of one virtual sequence: (place, entries that each token may see)."""
        before = int(self.count[slot, stream])
        parts, needed = [], len(position_K) if self.writes[stream] else 0
        while needed:
            if not self.left[slot, stream]:
                self._new_page(slot, stream)
            taken = min(needed, int(self.left[slot, stream]))
            start = int(self.next_place[slot, stream])
            parts.append(np.arange(start, start + taken))
            self.next_place[slot, stream] += taken
            self.left[slot, stream] -= taken
            needed -= taken
        place_K = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        index_K = before + np.arange(len(place_K))
        slots, streams = np.full(len(place_K), slot), np.full(len(place_K), stream)
        self._list(slots, streams, position_K[: len(place_K)], place_K, index_K)
        self.count[slot, stream] += len(place_K)
        compact = self.by_count and stream > 0
        return place_K, (index_K if compact else position_K) + 1

    def _seen(self, slot_M: np.ndarray, stream_M: np.ndarray, position_M: np.ndarray) -> np.ndarray:
        if not self.by_count:
            return position_M + 1
        return np.where(stream_M == 0, position_M + 1, self.count[slot_M, stream_M])

    def _new_page(self, slot: int, stream: int) -> None:
        kind = min(stream, 1)
        page = self.pools[kind].allocate() if self.page_bytes[kind] else 0
        if self.page_bytes[kind]:
            self.pages[slot][stream].append(page)
        self.next_place[slot, stream] = page * self.page_size
        self.left[slot, stream] = self.page_size

    def _list(
        self, slot_M: np.ndarray, stream_M: np.ndarray, position_M: np.ndarray, place_M: np.ndarray, index_M: np.ndarray
    ) -> None:
        """Enter new entries into the tables."""
        if self.overlaid:
            index_M = position_M
            first = stream_M == 1
            for stream in range(2, self.num_streams):
                self._set(slot_M[first], np.full(int(first.sum()), stream), index_M[first], place_M[first])
        self._set(slot_M, stream_M, index_M, place_M)

    def _set(self, slot_M: np.ndarray, stream_M: np.ndarray, index_M: np.ndarray, place_M: np.ndarray) -> None:
        self.table[slot_M, stream_M, index_M] = place_M
        if self.device.type != "cpu":
            row_M = torch.from_numpy(slot_M * self.num_streams + stream_M).to(self.device)
            at = (row_M, torch.from_numpy(index_M).to(self.device))
            self.table_EL[at] = torch.from_numpy(place_M.astype(np.int32)).to(self.device)

    def segment(self, slot: int, start: int, taken: np.ndarray, skipped: np.ndarray) -> Segment:
        """What a sequence has cached of the tokens from position ``start`` on, for the prefix cache.

        taken: (tokens, R) whether they took each recursion; skipped: (R,) how many earlier ones did.
        """
        entries: list[np.ndarray] = []
        for stream in range(self.num_streams):
            if not self.writes[stream]:
                begin = end = 0
            elif stream and self.by_count:
                begin = int(skipped[stream - 1])
                end = begin + int(taken[:, stream - 1].sum())
            else:
                begin, end = start, start + len(taken)
            entries.append(self.table[slot, stream, begin:end].copy())
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
        for segment in segments:
            start = self.count[slot].copy()
            for stream, places in enumerate(segment.entries):
                at = int(start[0]) if self.overlaid else int(start[stream])
                self._set(
                    np.full(len(places), slot),
                    np.full(len(places), stream),
                    at + np.arange(len(places)),
                    places.astype(np.int64),
                )
                self.count[slot, stream] += len(places)
            held |= set(segment.pages)
        for kind, page in sorted(held):
            self.pools[kind].share(page)
            self.pages[slot][kind].append(page)  # any stream of that kind: it is released with the slot

    def release(self, segment: Segment) -> None:
        """The prefix cache forgets a segment."""
        for kind, page in segment.pages:
            self.pools[kind].release(page)

    def copy_rows(self, row_M: np.ndarray) -> Tensor:
        return torch.from_numpy(row_M).to(self.device)


class LanePass:
    """A pass over one token of each of several sequences, at any mixture of depths.

    The tokens have their places already (:meth:`PagedKV.append`).
    """

    def __init__(self, kv: PagedKV, slot_M: np.ndarray, stream_M: np.ndarray) -> None:
        self.kv, self.kind = kv, min(int(stream_M[0]), 1)
        writing = kv.writes[stream_M]
        self.writes = bool(writing.any())
        self.writing = None if writing.all() else kv.copy_rows(np.flatnonzero(writing))
        self.place_W = kv.copy_rows(kv.place[slot_M, stream_M][writing])
        self.row_M = kv.copy_rows((slot_M * kv.num_streams + kv.read_stream[stream_M]).astype(np.int32))
        seen_M = kv.seen[slot_M, stream_M]
        self.longest = int(seen_M.max())
        self.seen_M = kv.copy_rows(seen_M.astype(np.int32))

    def write(self, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None:
        if self.writing is not None:
            k_MGH, v_MGH = k_MGH[self.writing], v_MGH[self.writing]
        self.kv.k[self.kind][layer].index_copy_(0, self.place_W, k_MGH)
        self.kv.v[self.kind][layer].index_copy_(0, self.place_W, v_MGH)

    def attend(self, layer: int, q_MNH: Tensor) -> Tensor:
        k_EGH, v_EGH = self.kv.k[self.kind][layer], self.kv.v[self.kind][layer]
        return self.kv.decode_attention(
            q_MNH, k_EGH, v_EGH, self.kv.table_EL, self.row_M, self.seen_M, longest=self.longest
        )


class ChunkPass:
    """A pass over several consecutive tokens of each of several sequences, all at one depth (prefill)."""

    def __init__(self, kv: PagedKV, slots: np.ndarray, stream: int, tokens: PackedTokens) -> None:
        self.kv, self.kind, self.tokens = kv, min(stream, 1), tokens
        self.writes = bool(kv.writes[stream])
        row_M, position_M = tokens.row_M.cpu().numpy(), tokens.position_M.cpu().numpy()
        rows, starts = np.unique(row_M, return_index=True)
        places, seen = [], []
        for row, start, end in zip(rows, starts, [*starts[1:], len(row_M)], strict=True):
            place_K, seen_K = kv.append_chunk(int(slots[row]), stream, position_M[start:end])
            places.append(place_K)
            seen.append(seen_K)
        self.place_M = kv.copy_rows(np.concatenate(places))
        seen_M = np.concatenate(seen)
        table_A = kv.copy_rows(slots[rows] * kv.num_streams + kv.read_stream[stream])
        self.entry_AS = kv.table_EL[table_A][:, : int(seen_M.max())]
        seen_AK = tokens.pad(kv.copy_rows(seen_M), fill=_PADDED_QUERY)
        self.visible_AKS = torch.arange(self.entry_AS.shape[1], device=kv.device) < seen_AK[:, :, None]

    def write(self, layer: int, k_MGH: Tensor, v_MGH: Tensor) -> None:
        self.kv.k[self.kind][layer].index_copy_(0, self.place_M, k_MGH)
        self.kv.v[self.kind][layer].index_copy_(0, self.place_M, v_MGH)

    def attend(self, layer: int, q_MNH: Tensor) -> Tensor:
        k, v = (
            pool[self.kind][layer].index_select(0, self.entry_AS.flatten()).unflatten(0, self.entry_AS.shape)
            for pool in (self.kv.k, self.kv.v)
        )
        return self.tokens.unpad(attention(self.tokens.pad(q_MNH), k, v, self.visible_AKS))


class PagedBatch:
    """Some running sequences as the cache of an ordinary forward: row i of the batch is slot ``slots[i]``."""

    def __init__(self, kv: PagedKV, slots: Sequence[int], lengths: Sequence[int]) -> None:
        self.kv, self.slots = kv, np.asarray(slots)
        self.batch = len(slots)
        self.length_B = torch.tensor(lengths, device=kv.device)

    def open(self, stream: int, reads: tuple[int, ...], tokens: PackedTokens) -> LanePass | ChunkPass:
        if len(tokens) > tokens.num_rows or bool((tokens.count_B > 1).any()):
            return ChunkPass(self.kv, self.slots, stream, tokens)
        slot_M = self.slots[tokens.row_M.cpu().numpy()]
        stream_M = np.full(len(slot_M), stream)
        self.kv.append(slot_M, stream_M, tokens.position_M.cpu().numpy())
        return LanePass(self.kv, slot_M, stream_M)
