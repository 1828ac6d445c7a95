"""Who runs: admission, room for pages, preemption. Oldest first everywhere, so nobody starves."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence

import numpy as np

from mor.engine.paged_kv import PagedKV
from mor.engine.pages import PrefixCache
from mor.engine.request import Phase, Request, Status


class Scheduler:
    """Waiting and running requests, each list by age. static: a new batch starts when the last one
    is done."""

    def __init__(self, kv: PagedKV, *, prefix_cache: PrefixCache | None, static: bool) -> None:
        self.kv, self.prefix_cache, self.static = kv, prefix_cache, static
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self._free_slots = list(range(kv.num_slots))[::-1]

    def add(self, request: Request) -> None:
        insort(self.waiting, request, key=lambda r: r.number)

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is; its slot and pages are free again."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        else:
            self._leave(request)
        request.status = Status.FINISHED

    def admit(self) -> None:
        """Move waiting requests to free slots, as long as their prompts have room without
        preempting anyone."""
        if self.static and self.running:
            return
        while self.waiting and self._free_slots:
            request, slot = self.waiting[0], self._free_slots[-1]
            ids = request.known_ids
            segments = self.prefix_cache.match(ids) if self.prefix_cache is not None else []
            self.kv.attach(slot, segments)
            taken = [segment.taken for segment in segments]
            cached = sum(map(len, taken))
            needed = self.kv.pages_for(len(ids) - cached, [slot])
            if self.running and not self._evict_until(needed):
                self.kv.free_slot(slot)
                return
            self._free_slots.pop()
            self.waiting.pop(0)
            request.slot, request.status = slot, Status.RUNNING
            request.phase = Phase.READ if cached < len(ids) - 1 else Phase.ENTER
            request.num_read, request.num_cached, request.taken = cached, cached, taken
            request.depths = [int(depth) for part in taken for depth in part.sum(1)]
            insort(self.running, request, key=lambda r: r.number)

    def make_room(
        self,
        requests: Sequence[Request],
        needed: Callable[[list[Request]], list[int]],
        *,
        one_each: bool = False,
    ) -> list[Request]:
        """Those of ``requests`` that can go on: pages are taken from cached prefixes first, then
        from the youngest.

        needed: pages of each kind that a list of requests takes. one_each: they take one each at
        most, so that there is nothing to look up while so many are free.
        """
        requests = list(requests)
        if one_each and self.kv.has_free([len(requests)] * 2):
            return requests
        while requests and not self._evict_until(needed(requests)):
            self.preempt(self.running[-1])
            requests = [request for request in requests if request.status is Status.RUNNING]
        return requests

    def preempt(self, request: Request) -> None:
        """Back to the queue without its keys and values; they are computed again when it
        returns."""
        self._leave(request)
        request.status, request.phase = Status.WAITING, Phase.READ
        request.num_read, request.depths, request.taken = 0, [], []
        request.preemptions += 1
        self.preemptions += 1
        self.add(request)

    def remember(self, request: Request) -> None:
        """Put what the request has read into the prefix cache."""
        if self.prefix_cache is None:
            return
        ids, size = request.known_ids[: request.num_read], self.prefix_cache.segment_size
        taken = np.concatenate(request.taken)
        for index in range(self.prefix_cache.known(ids), len(ids) // size):
            part = slice(index * size, (index + 1) * size)
            segment = self.kv.segment(
                request.slot, part.start, taken[part], taken[: part.start].sum(0)
            )
            self.prefix_cache.add(ids, index, segment)

    def clear_prefix_cache(self) -> None:
        while self.prefix_cache is not None and (segment := self.prefix_cache.evict()):
            self.kv.release(segment)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self.kv.free_slot(request.slot)
        self._free_slots.append(request.slot)
        request.slot = -1

    def _evict_until(self, pages: Sequence[int]) -> bool:
        """Drop cached prefixes until so many pages are free; False if they never are."""
        while not self.kv.has_free(pages):
            segment = self.prefix_cache.evict() if self.prefix_cache is not None else None
            if segment is None:
                return False
            self.kv.release(segment)
        return True
