"""The baselines: every sequence takes its next token in the same forward, whatever its depth.

B sequences · T columns · V vocab
"""

from __future__ import annotations

from mor.engine.request import Phase, Request
from mor.engine.strategy import Strategy


class LockStep(Strategy):
    """One token per sequence and step, embedding to head; finished ones are replaced at once."""

    def step(self) -> None:
        work = self.work
        requests = work.scheduler.make_room(work.in_phase(Phase.ENTER), self._pages)
        if not requests:
            return
        slots, ids = [r.slot for r in requests], [[r.newest_id] for r in requests]
        with work.measured.part("token", len(requests)):
            output = work.runner.read(slots, ids, [r.num_read for r in requests], "last")
        depths = output.routing.depth_BT[:, 0].tolist()
        work.sample(requests, depths, output.logits_BTV[:, 0])

    def _pages(self, requests: list[Request]) -> list[int]:
        return self.work.kv.pages_for(1, [request.slot for request in requests])


class StaticBatches(LockStep):
    """As lock-step, but a batch ends with its longest request; the others wait for it."""

    def admit(self) -> None:
        if not self.work.scheduler.running:
            super().admit()
