"""Who owns which page: counts, not tensors.

A page holds the keys and values of ``page_size`` entries in all layers of one kind (those of
prelude and coda, or the shared ones). Several sequences share a page when they begin alike.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


class PagePool:
    """Pages of one kind, with a count of owners for each."""

    def __init__(self, num_pages: int) -> None:
        self.owners = np.zeros(num_pages, dtype=np.int32)
        self._free = list(range(num_pages))[::-1]

    @property
    def num_pages(self) -> int:
        return len(self.owners)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """A page of the caller's own. Raises IndexError if there is none: callers make room
        first."""
        page = self._free.pop()
        assert self.owners[page] == 0
        self.owners[page] = 1
        return page

    def share(self, page: int) -> None:
        assert self.owners[page] > 0, f"page {page} has no owner to share it with"
        self.owners[page] += 1

    def release(self, page: int) -> None:
        assert self.owners[page] > 0, f"page {page} was released before"
        self.owners[page] -= 1
        if self.owners[page] == 0:
            self._free.append(page)


@dataclass(frozen=True)
class Segment:
    """Cached entries of ``len(depths)`` consecutive prompt tokens.

    entries: for each stream, where the entries lie. pages: the (stream, page) pairs that hold them.
    taken: whether each token took each recursion.
    """

    entries: list[np.ndarray]
    pages: list[tuple[int, int]]
    taken: np.ndarray


class PrefixCache:
    """Entries of prompts read before, by their tokens from the beginning.

    Routing looks at the past alone, so a prefix fixes its depths as well as its keys and values. A
    segment is found under its own tokens and the segment before it, and owns its pages.
    """

    def __init__(self, segment_size: int) -> None:
        self.segment_size = segment_size
        self._segments: OrderedDict[tuple[int, bytes], tuple[int, Segment]] = OrderedDict()
        self._numbers = 0
        self.hits = 0

    def __len__(self) -> int:
        return len(self._segments)

    def match(self, ids: Sequence[int]) -> list[Segment]:
        """Segments of the longest known prefix that leaves at least one token to read."""
        found: list[Segment] = []
        keys = []
        for key in self._keys(ids[: len(ids) - 1]):
            found.append(self._segments[key][1])
            keys.append(key)
        for key in reversed(keys):  # a segment is never older than those that follow it
            self._segments.move_to_end(key)
        self.hits += len(found)
        return found

    def known(self, ids: Sequence[int]) -> int:
        """Number of leading segments of ``ids`` that are remembered."""
        return sum(1 for _ in self._keys(ids))

    def add(self, ids: Sequence[int], index: int, segment: Segment) -> bool:
        """Remember segment number ``index`` of ``ids``; False if it is known or its predecessor is
        not."""
        before = list(self._keys(ids[: index * self.segment_size]))
        if len(before) < index:
            return False
        key = (self._segments[before[-1]][0] if before else 0, self._bytes(ids, index))
        if key in self._segments:
            return False
        self._numbers += 1
        self._segments[key] = (self._numbers, segment)
        for earlier in reversed(before):
            self._segments.move_to_end(earlier)
        return True

    def evict(self) -> Segment | None:
        """Forget the segment unused for longest; segments that follow it went before."""
        if not self._segments:
            return None
        return self._segments.popitem(last=False)[1][1]

    def _keys(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        number = 0
        for index in range(len(ids) // self.segment_size):
            key = (number, self._bytes(ids, index))
            if key not in self._segments:
                return
            yield key
            number = self._segments[key][0]

    def _bytes(self, ids: Sequence[int], index: int) -> bytes:
        return np.asarray(
            ids[index * self.segment_size : (index + 1) * self.segment_size], dtype=np.int64
        ).tobytes()
