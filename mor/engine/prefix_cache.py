"""The prefix cache: prompts with a common beginning read it once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Segment:
    """What is cached of some consecutive tokens of a prompt, as many as a page has room for.

    entries: for each stream, the places of these tokens' entries in the storage, in order. A stream
    of a recursion has an entry only for those that took it. pages: the (kind, page) pairs that hold
    them; the segment is one of their owners. taken: whether each token took each recursion,
    (tokens, recursions).
    """

    entries: list[np.ndarray]
    pages: list[tuple[int, int]]
    taken: np.ndarray


class PrefixCache:
    """Segments of earlier prompts, found by their tokens from the beginning of the prompt.

    Keys, values and depth of a token depend on it, the tokens before it and the rule for depths
    alone, since routing is causal: equal beginnings under equal rules have equal segments. A
    segment is stored under the number of the one before it (0: none) and its own tokens: looking up
    a prompt follows a chain. Segments are ordered by their last use, each before the ones that it
    follows, so the end of a chain is evicted first and no segment is left without its beginning.
    """

    def __init__(self, segment_size: int) -> None:
        self.segment_size = segment_size
        self.hits = 0
        self._segments: OrderedDict[tuple[int, bytes], tuple[int, Segment]] = OrderedDict()
        self._last_number = 0

    def __len__(self) -> int:
        return len(self._segments)

    def match(self, ids: Sequence[int], rule: bytes = b"") -> list[Segment]:
        """Segments of the longest known beginning of ``ids`` that leaves at least one token to
        read: the engine needs its logits. rule: what decides the depth of these tokens."""
        keys = list(self._chain(ids[: len(ids) - 1], rule))
        self._mark_used(keys)
        self.hits += len(keys)
        return [self._segments[key][1] for key in keys]

    def add(self, ids: Sequence[int], make: Callable[[int], Segment], rule: bytes = b"") -> None:
        """Cache the segments of ``ids`` that are not known yet.

        make: called for each of them, with its index, in order.
        """
        keys = list(self._chain(ids, rule))
        number = self._segments[keys[-1]][0] if keys else 0
        for index in range(len(keys), len(ids) // self.segment_size):
            keys.append((number, self._tokens(ids, index, rule)))
            number = self._last_number = self._last_number + 1
            self._segments[keys[-1]] = number, make(index)
        self._mark_used(keys)

    def evict(self) -> Segment | None:
        """Forget the segment unused for longest; None if there is none left."""
        if not self._segments:
            return None
        return self._segments.popitem(last=False)[1][1]

    def clear(self) -> None:
        self._segments.clear()

    def _mark_used(self, keys: list[tuple[int, bytes]]) -> None:
        for key in reversed(keys):  # the beginning of a chain is used last, so evicted last
            self._segments.move_to_end(key)

    def _chain(self, ids: Sequence[int], rule: bytes) -> Iterator[tuple[int, bytes]]:
        """Keys of the cached segments of ``ids``, from the beginning to the first unknown one."""
        number = 0
        for index in range(len(ids) // self.segment_size):
            key = (number, self._tokens(ids, index, rule))
            if key not in self._segments:
                return
            yield key
            number = self._segments[key][0]

    def _tokens(self, ids: Sequence[int], index: int, rule: bytes) -> bytes:
        """The key of a segment's tokens; that of the first also has the rule, which thereby is that
        of all that follow it."""
        start = index * self.segment_size
        tokens = np.asarray(ids[start : start + self.segment_size], dtype=np.int64).tobytes()
        return tokens if index else rule + tokens
