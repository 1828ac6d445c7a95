"""Who runs: admission, room for pages, preemption. Oldest first, so that no request starves."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mor.engine.paged_kv import PagedKV
from mor.engine.prefix_cache import PrefixCache, Segment
from mor.engine.request import Phase, Request, Status


def _age(request: Request) -> int:
    return request.number


def _runs_alone(request: Request) -> bool:
    """Two steps have failed with it: the next failure must show whether it is the cause."""
    return request.faults > 1


class Scheduler:
    """Waiting and running requests, each list oldest first, and the slots and pages they get."""

    def __init__(self, kv: PagedKV, prefix_cache: PrefixCache | None) -> None:
        self.kv, self.prefix_cache = kv, prefix_cache
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self._free_slots = list(range(kv.num_slots))[::-1]

    def add(self, request: Request) -> None:
        insort(self.waiting, request, key=_age)

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is; its slot and pages are free again."""
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        else:
            self._stop_running(request)
        request.status = Status.FINISHED

    def admit(self) -> None:
        """Give free slots to waiting requests while their prompts fit without preempting anyone."""
        while self.waiting and self._free_slots:
            request, slot = self.waiting[0], self._free_slots[-1]
            if self.running and any(map(_runs_alone, (request, self.running[0]))):
                return
            segments = self._cached_beginning(request)
            self.kv.most[slot] = request.budget.recursions
            self.kv.attach(slot, segments)
            left = len(request.known_ids) - sum(len(segment.taken) for segment in segments)
            # If none is running, the oldest request always fits: the engine refused it otherwise.
            if self.running and not self._evict_until_free(self.kv.pages_for(left, [slot])):
                self.kv.free_slot(slot)
                return
            self._start_running(request, segments)

    def make_room(
        self,
        requests: Sequence[Request],
        needed: Callable[[list[Request]], list[int]],
        *,
        one_each: bool = False,
    ) -> list[Request]:
        """Those of ``requests`` that can go on. Pages are taken from cached prefixes first, then
        from the youngest running requests, which go back to the queue.

        needed: pages of each kind that a list of requests takes. one_each: each takes one page at
        most, so there is no need to count while that many are free.
        """
        requests = list(requests)
        if one_each and self.kv.has_free([len(requests)] * 2):
            return requests
        while requests and not self._evict_until_free(needed(requests)):
            self._preempt(self.running[-1])
            requests = [request for request in requests if request.status is Status.RUNNING]
        return requests

    def remember(self, request: Request) -> None:
        """Put what the request has read so far into the prefix cache."""
        if self.prefix_cache is None or not self.kv.is_finite(request.slot):
            return
        taken, size = np.concatenate(request.taken), self.prefix_cache.segment_size

        def segment(index: int) -> Segment:
            start, end = index * size, (index + 1) * size
            return self.kv.segment(
                request.slot, start, taken[start:end], taken_before=taken[:start].sum(0)
            )

        self.prefix_cache.add(request.known_ids[: request.num_read], segment, request.budget.key)

    def clear_prefix_cache(self) -> None:
        while self._evict_prefix():
            pass

    def restart(self, unfinished: Iterable[Request]) -> None:
        """Forget all keys and values, cached prefixes too; all requests wait again. It looks at
        nothing but the requests, so it works after a step that stopped halfway."""
        self.kv.clear()
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
        self._free_slots = list(range(self.kv.num_slots))[::-1]
        self.running, self.waiting = [], sorted(unfinished, key=_age)
        for request in self.waiting:
            request.start_over()

    def _cached_beginning(self, request: Request) -> list[Segment]:
        """What is cached of it; nothing if all of the prompt's logits are needed."""
        if self.prefix_cache is None or request.scores_prompt:
            return []
        return self.prefix_cache.match(request.known_ids, request.budget.key)

    def _start_running(self, request: Request, segments: Sequence[Segment]) -> None:
        """Move the oldest waiting request to the next free slot, and attach ``segments`` to it."""
        self.waiting.pop(0)
        request.slot, request.status = self._free_slots.pop(), Status.RUNNING
        request.taken = [segment.taken for segment in segments]
        request.depths = [int(depth) for taken in request.taken for depth in taken.sum(1)]
        request.num_read = request.num_cached = len(request.depths)
        all_but_last = len(request.known_ids) - 1
        request.phase = Phase.READ if request.num_read < all_but_last else Phase.ENTER
        insort(self.running, request, key=_age)

    def _stop_running(self, request: Request) -> None:
        self.running.remove(request)
        self.kv.free_slot(request.slot)
        self._free_slots.append(request.slot)
        request.slot = -1

    def _preempt(self, request: Request) -> None:
        """Back to the queue without keys and values; they are computed again when it returns."""
        self._stop_running(request)
        request.start_over()
        request.preemptions += 1
        self.preemptions += 1
        self.add(request)

    def _evict_until_free(self, pages: Sequence[int]) -> bool:
        """Drop cached prefixes until this many pages are free; False if they never are."""
        while not self.kv.has_free(pages):
            if not self._evict_prefix():
                return False
        return True

    def _evict_prefix(self) -> bool:
        """Drop the cached segment unused for longest; False if there is none."""
        segment = None if self.prefix_cache is None else self.prefix_cache.evict()
        if segment is not None:
            self.kv.release(segment)
        return segment is not None
