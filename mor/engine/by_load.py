"""Lock-step or depth-wise, whichever serves the present load better."""

from __future__ import annotations

from mor.engine.depth_wise import DepthWise
from mor.engine.lock_step import LockStep
from mor.engine.strategy import Strategy, Work


class ByLoad(Strategy):
    """Lock-step while all running requests fit into one pass: coda and head of all of them are one
    pass too, and every request gets a token in every step. Depth-wise batching while there are more
    than lanes: then only tokens of different depths together keep the lanes full.

    Between the two, tokens that are underway take their passes, and no other enters.
    """

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.depth_wise, self.lock_step = DepthWise(work), LockStep(work)

    def step(self) -> None:
        if len(self.work.scheduler.running) > self.work.lanes:
            self.depth_wise.step()
        elif not self.depth_wise.finish_tokens():
            self.lock_step.step()
