"""Keys and values of many sequences in pools of pages, by (sequence, recursion).

A *virtual sequence* is what one running sequence has cached in one stream (stream 0: prelude and
coda, stream r: recursion r, see model/kv_cache.py). A table lists where its entries lie, in order.
So attention needs a row of the table and a number of visible entries, and nothing else: keys are
stored rotated at their position already, and a token sees a beginning of the row. No positions and
no mask, at any mixture of depths.

The strategies for keys and values differ only in the row that a recursion reads: its own; with
``shared`` that of recursion 1; with ``hybrid`` a row of a second table, the *view*, which names for
each position the recursion's own entry if there is one, or else that of recursion 1.

Who plans and who counts. The host reserves places for entries to come, page by page, before a pass
(:meth:`PagedKV.reserve`). The pass takes the next reserved places and counts its entries on the
device, in operations of static shapes, because in the device loop only the device knows which
tokens take part. ``count`` is that count. ``host_count`` is the host's copy, and only the host
writes to it: :meth:`PagedKV.refresh` copies, :meth:`PagedKV.attach` and :meth:`PagedKV.free_slot`
set both. Between a pass and the next refresh the copy is behind, on every device alike.

G key/value heads · H head dim · L width of a table · M tokens · R rows of a table (virtual
sequences: slot * V + stream) · V streams
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mor.costs import flops as costs
from mor.engine.attention import DecodeAttention
from mor.engine.kv_passes import LanePass
from mor.engine.pages import OWN, PagePool, divide_memory, kind_of
from mor.engine.prefix_cache import Segment
from mor.model.config import ModelConfig
from mor.model.kv_cache import READS
from mor.model.packing import PackedTokens


def default_memory(device: torch.device) -> int:
    """Bytes for keys and values where nobody says how many: 80% of a GPU's free memory, which
    leaves room for activations and logits; on a CPU, which others use too, 1 GiB."""
    if device.type != "cuda":
        return 1 << 30
    free, _ = torch.cuda.mem_get_info(device)
    # What the allocator holds and nobody uses is free as well.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(0.8 * (free + unused))


class PagedKV:
    """Pools, tables and counts for ``num_slots`` running sequences of up to ``max_len`` tokens.

    A further slot, ``idle``, has no sequence: passes of fixed size are filled up with it, and what
    they write goes to a place that is never read. num_recursions: that any token may take; None:
    the trained ones. Raises ValueError if ``num_bytes`` does not hold
    a page of each kind.
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
        num_recursions: int | None = None,
    ) -> None:
        self.num_recursions = num_recursions or config.num_recursions
        self.page_size, self.max_len = page_size, max_len
        self.num_slots, self.idle = num_slots, num_slots
        self.num_streams = self.num_recursions + 1
        self.device, self.decode_attention = torch.device(device), decode_attention
        self._set_rules(config)
        self._make_pools(config, num_bytes, dtype)
        self._make_tables(with_view=config.kv_strategy == "hybrid")
        self.pages: list[list[list[int]]] = [
            [[] for _ in range(self.num_streams)] for _ in range(num_slots)
        ]
        """Pages that each slot owns, ``pages[slot][stream]``. A kind without layers needs none."""

    def _set_rules(self, config: ModelConfig) -> None:
        """What the strategy for keys and values says about each stream."""
        if config.kv_strategy == "final":
            raise ValueError(
                "the engine does not keep keys and values of kv_strategy='final' yet; decode with "
                "mor.generate, or with transformers"
            )
        reads = [(0,), *(READS[config.kv_strategy](r) for r in range(1, self.num_streams))]
        self.writes = np.array([stream in r for stream, r in enumerate(reads)])
        self.writes_on_device = torch.tensor(self.writes, device=self.device)
        # A reader of the stream's own entries alone sees as many as there are up to its token's.
        # Any other reader sees one entry for every token up to its own.
        compact = [r == (stream,) for stream, r in enumerate(reads)]
        self.compact = torch.tensor(compact, device=self.device)
        # The stream whose row of the view is read.
        self.view_of = torch.tensor([r[-1] for r in reads], device=self.device)
        # Known on the host, so that the common case skips the operations for the others.
        self.all_write, self.all_compact = bool(self.writes.all()), all(compact)

    def _make_pools(self, config: ModelConfig, num_bytes: int, dtype: torch.dtype) -> None:
        layers = (config.prelude_layers + config.coda_layers, config.shared_layers)
        entry_bytes = costs.kv_entry_bytes(config, dtype.itemsize)
        self.page_bytes = [n * self.page_size * entry_bytes for n in layers]
        # A further recursion takes from the pages of the others: how much is not known here.
        writing = zip(config.capacities, self.writes[1:], strict=False)
        pages_per_stream = self.num_slots * -(-self.max_len // self.page_size)
        num_pages = divide_memory(
            num_bytes,
            page_bytes=self.page_bytes,
            entries_per_token=[1.0, sum(capacity for capacity, writes in writing if writes)],
            most_pages=[pages_per_stream, pages_per_stream * int(self.writes[1:].sum())],
        )
        self.pools = [PagePool(n) for n in num_pages]

        def storage() -> list[list[Tensor]]:
            # Zeros, not empty: what a query must not see is multiplied by zero, and NaN would stay.
            # One page more than the pool has: its places are for entries that are never read.
            shapes = [
                ((n + 1) * self.page_size, config.num_kv_heads, config.head_dim) for n in num_pages
            ]
            return [
                [torch.zeros(shape, device=self.device, dtype=dtype) for _ in range(n)]
                for shape, n in zip(shapes, layers, strict=True)
            ]

        self.k, self.v = storage(), storage()  # [kind][layer], each (E, G, H)

    def _make_tables(self, *, with_view: bool) -> None:
        rows, width = (self.num_slots + 1) * self.num_streams, self.max_len + self.page_size
        self.host_table_RL = np.zeros((rows, width), dtype=np.int32)
        """Whatever is in the table, the host has entered; so it is never read back."""
        pools = [self.pools[kind_of(stream)] for stream in range(self.num_streams)]
        unread = np.array([pool.num_pages * self.page_size for pool in pools])
        self.unread = torch.from_numpy(unread).to(self.device)
        self.host_table_RL[self.idle * self.num_streams :] = unread[:, None]
        self.table_RL = torch.from_numpy(self.host_table_RL).to(self.device)  # on the CPU: the same
        # Without hybrid reading, what is read is what was written.
        self.view_RL = self.table_RL.clone() if with_view else self.table_RL
        self.count = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.host_count = np.zeros((self.num_slots + 1, self.num_streams), dtype=np.int64)
        self.most = np.full(self.num_slots + 1, self.num_recursions)
        """Recursions that each slot's tokens may take."""
        self.reserved = np.zeros_like(self.host_count)
        """Entries of each virtual sequence that have places, those to come included."""

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

    def pages_for(
        self,
        tokens: int | np.ndarray,
        slots: Sequence[int] | None = None,
        *,
        most: int | None = None,
    ) -> list[int]:
        """Pages of each kind that ``tokens`` more tokens take at most, if they take every recursion
        that they may.

        slots: the sequences that each get so many, less what they have reserved; None: one new
        sequence, whose tokens take ``most`` recursions at most (None: all). tokens: one number, or
        one for each slot and stream.
        """
        reserved = np.zeros((1, self.num_streams), dtype=np.int64)
        limit = np.array([most or self.num_recursions])
        if slots is not None:
            reserved = (self.reserved - self.host_count)[list(slots)]
            limit = self.most[list(slots)]
        used = self.writes & (np.arange(self.num_streams) <= limit[:, None])
        pages = -(-np.maximum(tokens - reserved, 0) // self.page_size) * used
        return [int(pages[:, 0].sum()) if self.page_bytes[OWN] else 0, int(pages[:, 1:].sum())]

    def pages_for_entry(self, slot: np.ndarray, stream: np.ndarray) -> list[int]:
        """Pages of each kind that one more entry in each of these virtual sequences takes."""
        full = self.reserved[slot, stream] == self.host_count[slot, stream]
        full &= self.writes[stream]
        own = int((full & (stream == 0)).sum()) if self.page_bytes[OWN] else 0
        return [own, int((full & (stream > 0)).sum())]

    def has_free(self, pages: Sequence[int]) -> bool:
        """Whether this many pages of each kind are free."""
        return all(pool.num_free >= n for pool, n in zip(self.pools, pages, strict=True))

    def free_slot(self, slot: int) -> None:
        """Forget a sequence; pages without another owner are free again."""
        for stream, pages in enumerate(self.pages[slot]):
            for page in pages:
                self.pools[kind_of(stream)].release(page)
            pages.clear()
        self.reserved[slot] = 0
        self.host_count[slot] = 0
        self.count.view(self.host_count.shape)[slot].zero_()

    def clear(self) -> None:
        """Forget every sequence and segment, whatever state they are in."""
        self.pools = [PagePool(pool.num_pages) for pool in self.pools]
        for pages in (pages for of_slot in self.pages for pages in of_slot):
            pages.clear()
        self.reserved[:] = self.host_count[:] = 0
        self.count.zero_()

    def is_finite(self, slot: int) -> bool:
        """Whether all keys and values that a sequence has cached are finite."""
        table_VL = self.table_RL.view(*self.host_count.shape, -1)[slot]
        found = []
        for stream, count in enumerate(self.host_count[slot] * self.writes):
            places, kind = table_VL[stream, :count], kind_of(stream)
            found += [pool[places].isfinite().all() for pool in (*self.k[kind], *self.v[kind])]
        return bool(torch.stack(found).all())

    def _set_count(self, slot: int, count: np.ndarray) -> None:
        self.host_count[slot] = count
        self.count.view(self.host_count.shape)[slot] = torch.from_numpy(count).to(self.device)

    def refresh(self, counted: np.ndarray | None = None) -> None:
        """Copy what the device has counted to the host, unless it is there already (``counted``,
        of every virtual sequence)."""
        if counted is None:
            counted = self.count.cpu().numpy()
        self.host_count[:] = counted.reshape(self.host_count.shape)

    def reserve(self, slot: np.ndarray, stream: np.ndarray, entries: int | np.ndarray = 1) -> None:
        """Places for this many more entries of virtual sequences; callers make room first."""
        row = slot * self.num_streams + stream
        missing = self.host_count.take(row) + entries - self.reserved.take(row)
        may_write = self.writes[stream] & (stream <= self.most[slot])
        if not (short := (missing > 0) & may_write).any():
            return
        new = [
            self._add_page(int(slot[i]), int(stream[i]))
            for i in short.nonzero()[0]
            for _ in range(-(-int(missing[i]) // self.page_size))
        ]
        row, start, first = np.array(new).T[..., None]
        within = np.arange(self.page_size)
        self._fill_table(row, start + within, first + within)

    def _add_page(self, slot: int, stream: int) -> tuple[int, int, int]:
        """Take a page for a virtual sequence: its row of the table, where in it the page's places
        stand, and the first of them."""
        kind, start, page = kind_of(stream), int(self.reserved[slot, stream]), 0
        if self.page_bytes[kind]:
            page = self.pools[kind].allocate()
            self.pages[slot][stream].append(page)
        self.reserved[slot, stream] += self.page_size
        return slot * self.num_streams + stream, start, page * self.page_size

    def _fill_table(self, row: np.ndarray, column: np.ndarray, place: np.ndarray) -> None:
        """Enter places into the table, in one copy to the device."""
        self.host_table_RL[row, column] = place
        if self.device.type != "cpu":
            changed = np.stack(np.broadcast_arrays(row, column, place))
            on_device = torch.from_numpy(changed).to(self.device)
            self.table_RL[on_device[0], on_device[1]] = on_device[2].int()

    def append(
        self,
        slot: Tensor,
        stream: Tensor,
        position: Tensor,
        new: Tensor,
        *,
        kind: int,
        longest: int | None = None,
        writes: bool = True,
    ) -> LanePass:
        """Open a pass over one token of each of several sequences, at any mixture of depths; their
        places are reserved.

        new: whether the token gets an entry now; if not, it has one from an earlier pass of the
        same recursion. kind: of the layers that the pass runs through. longest: entries that any
        token sees at most; if it is given, no value is looked up on the device. writes: False if
        it is known that none of these streams is written.
        """
        row = slot * self.num_streams + stream
        # Only passes of fixed size, which are filled up, have tokens of the idle slot.
        counted = new if longest is None else new & (slot != self.idle)
        if not self.all_write:
            may_write = self.writes_on_device[stream]
            counted = counted & may_write
            if longest is None:
                writes = bool(may_write.any())
        self.count.index_add_(0, row, counted.long())
        # A token's entry is the last of its row, whether it is new or not. The idle slot has none.
        index = (self.count[row] - 1).clamp(min=0)
        place = self.table_RL[row, index].long()
        view, seen = row, index + 1
        if not self.all_write:
            place = torch.where(may_write, place, self.unread[stream])
        if not self.all_compact:
            view = slot * self.num_streams + self.view_of[stream]
            seen = torch.where(self.compact[stream], index, position) + 1
        if self.view_RL is not self.table_RL:
            self._update_view(slot, stream, position, place)
        return LanePass(
            self, kind, writes, place, view.int(), seen.int(), longest or int(seen.max())
        )

    def append_chunk(
        self, slot: Tensor, stream: int, tokens: PackedTokens
    ) -> tuple[Tensor, Tensor]:
        """Consecutive entries of several virtual sequences of one stream: the place of each, and
        the entries that each token may see."""
        if not self.writes[stream]:  # it reads entries of recursion 1, one for every token
            return self.unread[stream].expand(len(slot)), tokens.position + 1
        row = slot * self.num_streams + stream
        rank = tokens.rank  # of each token among those of its sequence in this chunk
        index = self.count[row] + rank
        place = self.table_RL[row, index].long()
        self.count.index_add_(0, row, torch.ones_like(row))
        if self.view_RL is not self.table_RL:
            self._update_view(slot, torch.full_like(slot, stream), tokens.position, place)
        return place, torch.where(self.compact[stream], index, tokens.position) + 1

    def _update_view(self, slot: Tensor, streams: Tensor, position: Tensor, place: Tensor) -> None:
        """Enter new entries into the view (hybrid).

        An entry of recursion 1 is what every later recursion reads at that position, until the
        token takes that recursion too and its own entry replaces it. Which tokens those are is
        known on the device alone; so all are written to every stream's row, and the ones that do
        not belong there go to the row of the idle slot.
        """
        for stream in range(self.num_streams):
            belongs = (streams == stream) | ((streams == 1) & (stream > 1))
            row = torch.where(belongs, slot, self.idle) * self.num_streams + stream
            entry = torch.where(belongs, place, self.unread[stream])
            self.view_RL[row, position] = entry.int()

    def write(self, kind: int, layer: int, place: Tensor, k_MGH: Tensor, v_MGH: Tensor) -> None:
        """Store the entries of one layer."""
        self.k[kind][layer].index_copy_(0, place, k_MGH)
        self.v[kind][layer].index_copy_(0, place, v_MGH)

    def segment(
        self, slot: int, start: int, taken: np.ndarray, taken_before: np.ndarray
    ) -> Segment:
        """What a sequence has cached of its tokens from position ``start`` on, for the prefix
        cache. The segment becomes an owner of the pages.

        taken: (tokens, recursions) whether they took each recursion. taken_before: (recursions,)
        how many of the tokens before ``start`` did; their entries come first in a recursion's row.
        """
        first_entries = np.array([start, *taken_before])
        entries_per_stream = np.array([len(taken), *taken.sum(0)]) * self.writes
        table_VL = self.host_table_RL.reshape(*self.host_count.shape, -1)[slot]
        entries = [
            table_VL[stream, first : first + n].copy()
            for stream, (first, n) in enumerate(zip(first_entries, entries_per_stream, strict=True))
        ]
        pages = {
            (kind_of(stream), int(page))
            for stream, places in enumerate(entries)
            if self.page_bytes[kind_of(stream)]
            for page in np.unique(places // self.page_size)
        }
        for kind, page in pages:
            self.pools[kind].share(page)
        return Segment(entries, sorted(pages), taken)

    def attach(self, slot: int, segments: Sequence[Segment]) -> None:
        """Begin a sequence with cached segments. What follows goes to new pages: the last page of a
        segment may have room left, but its first owner goes on writing there."""
        if not segments:
            return
        taken = np.concatenate([segment.taken for segment in segments])
        for stream in range(self.num_streams):
            place = np.concatenate([segment.entries[stream] for segment in segments])
            self._adopt(slot, stream, place, taken)
        self._set_count(slot, self.reserved[slot])
        for kind, page in sorted({page for segment in segments for page in segment.pages}):
            self.pools[kind].share(page)
            # All pages of a slot are released together, so any stream of their kind may list them;
            # the first of a kind has its number.
            self.pages[slot][kind].append(page)

    def _adopt(self, slot: int, stream: int, place: np.ndarray, taken: np.ndarray) -> None:
        """Begin a stream with the entries of segments, which lie in these places."""
        row = np.array(slot * self.num_streams + stream)
        self._fill_table(row, np.arange(len(place)), place)
        self.reserved[slot, stream] = len(place)
        if self.view_RL is not self.table_RL:
            took = np.ones(len(taken), dtype=bool) if stream == 0 else taken[:, stream - 1]
            entries = torch.from_numpy(np.stack([np.flatnonzero(took), place])).to(self.device)
            slots = torch.full_like(entries[0], slot)
            self._update_view(slots, torch.full_like(slots, stream), entries[0], entries[1])

    def release(self, segment: Segment) -> None:
        """The prefix cache has forgotten a segment: it owns its pages no more."""
        for kind, page in segment.pages:
            self.pools[kind].release(page)
