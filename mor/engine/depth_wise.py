"""Continuous depth-wise batching, with the host choosing the tokens of every pass.

A token that needs another recursion shares the next pass of the shared block with tokens at any
other depth. A token that is done goes on to coda and head, and its sequence's next token comes in.

D model · M tokens of a pass · R recursions · S slots · V vocab
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mor.engine.request import Phase, Request
from mor.engine.strategy import Strategy, Work

Entries = tuple[np.ndarray, np.ndarray]
"""(slot, stream) of the virtual sequences that get a new entry."""


class DepthWise(Strategy):
    """Each step is one pass of the shared block; before it, if the lanes have room, tokens end and
    new ones enter."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._recursions = [recursion for recursion, _ in work.runner.passes]

    def step(self) -> None:
        # While the lanes are full without them, tokens that are done wait: coda and head of many
        # tokens together read their weights once.
        if len(self.work.in_phase(Phase.BLOCK)) < self.work.lanes:
            self._end_tokens()
            self._enter_tokens()
        self._pass()
        self.work.kv.refresh()

    def finish_tokens(self) -> bool:
        """Bring tokens that are underway closer to their end, with no new ones. False once there
        are none: all running requests wait to read or to enter."""
        if self.work.in_phase(Phase.BLOCK):
            self._pass()
            self.work.kv.refresh()
            return True
        self._end_tokens()
        return False

    def take_over(self, requests: list[Request]) -> None:
        """Go on with tokens that the device has chosen."""
        if requests:
            self._advance(requests, self.work.slots(requests))

    def _end_tokens(self) -> None:
        """Coda, head and sampling for the tokens that took their last pass."""
        work = self.work
        if not (ending := work.in_phase(Phase.CODA)):
            return
        slot = work.slots(ending)
        with work.measured.part("coda", len(ending)):
            x_MD = work.runner.coda(slot)
        with work.measured.part("head", len(ending)):
            logits_MV = work.runner.head(x_MD)
        depths = work.runner.took_SR[slot].sum(1).tolist()
        work.sample(ending, depths, logits_MV)

    def _enter_tokens(self) -> None:
        """Embedding and prelude of the newest tokens."""
        work = self.work
        entering = self._with_room(work.in_phase(Phase.ENTER), self._entries_to_enter)
        if not entering:
            return
        columns = list(zip(*((r.slot, r.newest_id, r.num_read) for r in entering), strict=True))
        slot, ids, position = torch.from_numpy(np.array(columns)).to(work.kv.device)
        with work.measured.part("enter", len(entering)):
            work.runner.enter(slot, ids, position)
        self._advance(entering, slot)

    def _pass(self) -> None:
        """One pass of the shared block: the oldest tokens, and others at the same layers of it."""
        work, passes = self.work, self.work.runner.passes
        if not (ready := work.in_phase(Phase.BLOCK)):
            return
        layers = passes[ready[0].stage][1]
        ready = [request for request in ready if passes[request.stage][1] == layers]
        ready = self._with_room(ready[: work.lanes], self._entries_for_pass)
        if not ready:
            return
        slot = work.slots(ready)
        with work.measured.part("block", len(ready)):
            work.runner.block(slot, layers)
        self._advance(ready, slot)

    def _advance(self, requests: list[Request], slot: Tensor) -> None:
        """Learn where the router sent the tokens."""
        stages = self.work.runner.stage[slot].tolist()
        for request, stage in zip(requests, stages, strict=True):
            request.stage = stage
            request.phase = Phase.CODA if stage == len(self._recursions) else Phase.BLOCK

    def _with_room(
        self, requests: list[Request], entries: Callable[[list[Request]], Entries]
    ) -> list[Request]:
        """Those that can go on, with places for their new entries."""

        def needed(requests: list[Request]) -> list[int]:
            return self.work.kv.pages_for_entry(*entries(requests))

        requests = self.work.scheduler.make_room(requests, needed, one_each=True)
        if requests:
            self.work.kv.reserve(*entries(requests))
        return requests

    def _entries_to_enter(self, requests: list[Request]) -> Entries:
        slot = np.array([request.slot for request in requests])
        return slot, np.zeros_like(slot)

    def _entries_for_pass(self, requests: list[Request]) -> Entries:
        """A recursion that takes several passes gets its entry in the first of them."""
        new = [
            (request.slot, self._recursions[request.stage] + 1)
            for request in requests
            if self._recursions[request.stage] not in self._recursions[: request.stage]
        ]
        slot, stream = np.array(new, dtype=np.int64).reshape(-1, 2).T
        return slot, stream
