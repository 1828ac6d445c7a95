"""Depth-wise batching without the host in the inner loop: a fixed pattern of steps of fixed sizes,
with the tokens of each step chosen on the device.

A launch runs ``codas`` times [some blocks, coda]. A block step takes the oldest tokens that want a
pass, a coda step the oldest that are done: head, sampling, stop test, and embedding and prelude of
the next token. Lanes without a token work for the idle slot. On CUDA a launch is one CUDA graph, of
which there is one for each :class:`Variant`, and so is the start of new requests; elsewhere the
same steps run one by one, which is what the tests compare with the plain decoder. What goes in and
what comes out is a copy each.

D model · F numbers that tell of a new request · J stop tokens · K coda steps of a launch · M lanes
or requests · R recursions · S slots · V vocab
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mor.engine.depth_wise import DepthWise
from mor.engine.request import Phase, Request
from mor.engine.runner import Runner, compile_methods
from mor.engine.sampling import (
    Drawn,
    SamplingRows,
    finite_rows,
    logprob_rows,
    most_needed,
    sample_rows,
)
from mor.engine.strategy import Strategy, Work
from mor.generation import SamplingParams
from mor.model.transformer import Transformer, passes

MAX_STOP_TOKENS = 16
_NEVER = torch.iinfo(torch.int64).max  # the age of a slot that is not wanted


class DeviceLoop(Strategy):
    """Several passes of all running requests are one launch; the host reserves places before it
    and takes the new tokens after it.

    While a request runs whose next token depends on those before by more than the model
    (penalties, a structure, and what else changes logits), or that wants the likeliest tokens, the
    host chooses the tokens of every pass, as depth-wise batching without a device loop does.
    """

    static_shapes = True

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.steps = DeviceSteps(work.runner, lanes=work.lanes)
        self.on_host, self.host_chooses = DepthWise(work), False

    @staticmethod
    def fits(model: Transformer) -> bool:
        """Whether every pass of the model applies the same layers, as a fixed pattern needs."""
        first, *others = (layers for _, layers in passes(model.config))
        return all(layers == first for layers in others)

    def step(self) -> None:
        if any(map(_needs_host, self.work.scheduler.running)):
            if not self.host_chooses:
                self.on_host.take_over(self.work.in_phase(Phase.BLOCK))
            self.host_chooses = True
            self.on_host.step()
            return
        # No launch before all tokens that the host has entered are at their end.
        self.host_chooses = self.host_chooses and self.on_host.finish_tokens()
        if not self.host_chooses:
            self._launch()

    def _launch(self) -> None:
        work = self.work
        requests = work.in_phase(Phase.ENTER) + work.in_phase(Phase.BLOCK)
        requests = work.scheduler.make_room(requests, self._pages)
        if not requests:
            return
        self._reserve(requests)
        by_slot = {request.slot: request for request in requests}
        with work.measured.part("launch", len(requests)):
            if entering := [request for request in requests if request.phase is Phase.ENTER]:
                self.steps.start(entering)
            new = self.steps.launch(list(by_slot))
        for request in requests:
            request.phase = Phase.BLOCK
        work.measured.tokens["sample"] += len(new)
        work.measured.tokens["block"] += sum(token.depth for token in new)
        for token in new:
            request = by_slot[token.slot]
            if request.finish_reason is None:  # a stop string may have ended it within the launch
                work.take(request, Drawn(token.token_id, token.logprob), depth=token.depth)

    def _reserve(self, requests: list[Request]) -> None:
        entries = self._entries(requests)
        slots = np.array([request.slot for request in requests])
        slot, stream = np.broadcast_arrays(slots[:, None], np.arange(entries.shape[1]))
        self.work.kv.reserve(slot.ravel(), stream.ravel(), entries.ravel())

    def _pages(self, requests: list[Request]) -> list[int]:
        return self.work.kv.pages_for(self._entries(requests), [r.slot for r in requests])

    def _entries(self, requests: list[Request]) -> np.ndarray:
        """The most entries that a launch adds to each stream of a request, (requests, streams)."""
        counted = self.work.kv.host_count[[request.slot for request in requests]]
        read = np.array([[request.num_read] for request in requests])
        longest = np.array([[request.max_length] for request in requests])
        # The token under way is not read yet, but may have its entry in a stream already.
        steps: np.ndarray = np.minimum(self.steps.codas + 1, longest - np.maximum(read, counted))
        return steps


def _needs_host(request: Request) -> bool:
    return request.answer.changes_logits or request.params.top_logprobs > 0


@dataclass(frozen=True)
class NewToken:
    """token_id: None if the logits are not finite. depth: recursions of the token that predicted
    it."""

    slot: int
    token_id: int | None
    depth: int
    logprob: float


class Variant(NamedTuple):
    """What is fixed in a launch. best: how many of the largest logits sampling looks at (0: it is
    greedy; None: all). logprobs: whether they are wanted."""

    lanes: int
    best: int | None
    logprobs: bool


@dataclass(frozen=True)
class Passes:
    """What a block step does: tokens at passes ``first`` <= stage < ``end``, and whether any of
    these passes writes keys and values."""

    first: int
    end: int
    writes: bool


class DeviceSteps:
    """Runs what it was given with :meth:`start` until it stops, all state on the device. One launch
    gives a request at most ``codas`` tokens.

    runner: with ``longest`` set, so that nothing is looked up.
    """

    def __init__(self, runner: Runner, *, lanes: int, codas: int = 4) -> None:
        assert runner.longest is not None
        slots, device = runner.kv.num_slots + 1, runner.kv.device
        # Two at least: for one alone PyTorch would compile everything again.
        self.runner, self.lanes, self.codas = runner, max(2, min(lanes, slots - 1)), codas
        self.layers, self.end, self.idle = runner.passes[0][1], len(runner.passes), runner.kv.idle
        self.blocks = self._pattern()
        self.live = torch.zeros(slots, dtype=torch.bool, device=device)
        self.age, self.remaining = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.stop_SJ = torch.full((slots, MAX_STOP_TOKENS), -1, device=device)
        self.sampling = SamplingRows.greedy(slots, device)
        self.params: dict[int, SamplingParams] = {}  # of the request in each slot
        # Slot, token, depth and log-probability that each coda step found in each lane.
        self.out_KM4 = torch.zeros(codas, self.lanes, 4, dtype=torch.float64, device=device)
        self.graphed = device.type == "cuda"
        self.keep, self.given_MF, self.found = self._mail(slots)
        self.graphs: dict[Variant | int, torch.cuda.CUDAGraph] = {}
        self.graph_memory: Any = None
        if runner.compiled:
            compile_methods(self, "_wanting", "_done", "_follow")

    def _pattern(self) -> list[list[Passes]]:
        """The block steps before each coda step of a launch: together as many as a token is
        expected to take passes, so that neither block nor coda steps run half empty.

        Where later recursions read what the first one wrote (``shared``), one step is for first
        passes and the others, for the later ones, make no keys and values.
        """
        config, writes = self.runner.model.config, self.runner.kv.writes[1:]
        later = sum(config.capacities[1 : self.end])
        upto = [math.ceil(k * later - 1e-6) for k in range(self.codas + 1)]
        first, others = Passes(0, self.end, writes=True), Passes(0, self.end, writes=True)
        if self.end > 1 and not writes[1 : self.end].any():
            first, others = Passes(0, 1, writes=True), Passes(1, self.end, writes=False)
        return [[first, *[others] * (b - a)] for a, b in pairwise(upto)]

    def _mail(self, slots: int) -> tuple[_Mail, _Mail, _Mail]:
        """What the host sends before a launch (the slots that go on) and before a start, and what
        it gets after a launch (counts of the cache, then ``out_KM4``)."""
        device, most = self.live.device, _size(slots - 1)
        numbers = self.runner.kv.count.numel() + self.out_KM4.numel()
        given = _Mail((most, _NUMBERS), torch.int64, device)
        self.nobody_MF = self._numbers([], most).to(device)
        keep = _Mail((slots,), torch.bool, device)
        return keep, given, _Mail((numbers,), torch.float64, device)

    def start(self, requests: Sequence[Request]) -> None:
        """Begin the newest token of each request; its earlier ones are cached."""
        size = _size(len(requests))
        with self._ready(size, lambda: self._begin(size)) as run:
            self.given_MF.send(self._numbers(requests, size))
            run()
        self.params |= {request.slot: request.params for request in requests}

    def _numbers(self, requests: Sequence[Request], size: int) -> Tensor:
        """All that tells of requests, 8 bytes each, filled up with the idle slot."""
        missing = size - len(requests)
        params = [r.params for r in requests] + [SamplingParams(temperature=0)] * missing
        drawn = [len(r.token_ids) for r in requests] + [0] * missing
        known = [
            (r.slot, r.newest_id, r.num_read, r.number, p.max_new_tokens - n, *_stops(p))
            for r, p, n in zip(requests, params, drawn, strict=False)
        ]
        known += [(self.idle, 0, 0, 0, 0, *[-1] * MAX_STOP_TOKENS)] * missing
        rows = SamplingRows.of(params, drawn, torch.device("cpu"))
        columns = [getattr(rows, f.name).view(torch.int64) for f in fields(rows)]
        return torch.cat([torch.tensor(known), torch.stack(columns, dim=1)], dim=1)

    def _begin(self, size: int) -> None:
        slot, ids, position, age, remaining, *others = self.given_MF.device[:size].t().contiguous()
        self.live[slot] = slot != self.idle
        self.age[slot], self.remaining[slot] = age, remaining
        self.stop_SJ[slot] = torch.stack(others[:MAX_STOP_TOKENS], dim=1)
        own = (getattr(self.sampling, f.name).dtype for f in fields(SamplingRows))
        rows = map(Tensor.view, others[MAX_STOP_TOKENS:], own)
        self.sampling.put(slot, SamplingRows(*rows))
        # Each in memory of its own: of parts of one tensor PyTorch would compile the offsets too.
        self.runner.enter(slot.clone(), ids.clone(), position.clone())

    def launch(self, slots: Sequence[int]) -> list[NewToken]:
        """One pattern of steps for the requests in these slots; their new tokens in order."""
        variant = self._variant(slots)
        keep = torch.zeros(len(self.live), dtype=torch.bool)
        keep[list(slots)] = True
        with self._ready(variant, lambda: self._run(variant)) as run:
            self.keep.send(keep)
            run()
        counts, out = np.split(self.found.fetch(), [self.runner.kv.count.numel()])
        self.runner.kv.refresh(counts)
        rows = out.reshape(self.out_KM4.shape)[:, : variant.lanes].reshape(-1, 4)
        return [
            NewToken(int(s), int(t) if t >= 0 else None, int(d), p)
            for s, t, d, p in rows[rows[:, 0] != self.idle].tolist()
        ]

    def _variant(self, slots: Sequence[int]) -> Variant:
        """The smallest that serves these slots. Sizes are powers of two, and of four for ``best``,
        so that there are few."""
        lanes = min(self.lanes, max(2, 1 << (len(slots) - 1).bit_length()))
        params = [self.params[slot] for slot in slots]
        needed = [most_needed(p) for p in params]
        best = None if None in needed else max(n or 0 for n in needed)
        if best:
            best = 4 ** -(-(best - 1).bit_length() // 2)
        return Variant(lanes, best, any(p.logprobs for p in params))

    @contextmanager
    def _ready(self, key: Variant | int, work: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """How to run this work: on CUDA as a graph, which is recorded the first time."""
        if not self.graphed:
            yield work
            return
        with torch.cuda.device(self.live.device):
            if key not in self.graphs:
                with self._at_rest():
                    self.graphs[key] = self._record(work)
            yield self.graphs[key].replay

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """All lanes are idle and nobody starts, while steps are tried and recorded."""
        live = self.live.clone()
        self.live.zero_()
        self.given_MF.device.copy_(self.nobody_MF)  # not through the host: a start may be under way
        try:
            yield
        finally:
            self.live.copy_(live)

    def _record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Graphs share their memory: no launch needs what an earlier one left there. Other threads
        may use the device meanwhile."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        self.graph_memory = self.graph_memory or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.graph_memory, capture_error_mode="thread_local"):
            work()
        return graph

    def _run(self, variant: Variant) -> None:
        self.live &= self.keep.device
        for k, steps in enumerate(self.blocks):
            for block in steps:
                self._block(variant.lanes, block)
            self._coda(k, variant)
        torch.cat([self.runner.kv.count.double(), self.out_KM4.flatten()], out=self.found.device)

    def _block(self, lanes: int, step: Passes) -> None:
        slot = self._wanting(lanes, step)
        self.runner.block(slot, self.layers, writes=step.writes)

    def _coda(self, k: int, variant: Variant) -> None:
        runner = self.runner
        slot = self._done(variant.lanes)
        logits_MV = runner.head(runner.coda(slot))
        token = logits_MV.argmax(-1)
        if variant.best != 0:
            token = sample_rows(logits_MV, self.sampling.at(slot), variant.best)
        finite = finite_rows(logits_MV)
        logprob = logprob_rows(logits_MV, token) if variant.logprobs else torch.zeros_like(slot)
        out_M4 = self.out_KM4[k, : variant.lanes]
        runner.enter(*self._follow(slot, token, finite, logprob, out_M4))

    def _wanting(self, lanes: int, step: Passes) -> Tensor:
        """The slots that a block step takes."""
        # The idle slot is always at the first pass, with the same state: passes add up, and a token
        # that never ends would overflow.
        stage = self.runner.stage
        stage[self.idle :].zero_()
        self.runner.h_SD[self.idle :].zero_()
        wanted = self.live & (stage < step.end)
        if step.first:
            wanted &= stage >= step.first
        return self._oldest(wanted, lanes)

    def _done(self, lanes: int) -> Tensor:
        """The slots that a coda step takes."""
        return self._oldest(self.live & (self.runner.stage == self.end), lanes)

    def _follow(
        self, slot: Tensor, token: Tensor, finite: Tensor, logprob: Tensor, out_M4: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Note new tokens; slot, id and position of those that are read next. The idle slot stands
        for what has stopped."""
        depth = self.runner.took_SR[slot].sum(1)
        found = (slot, token.where(finite, -1), depth, logprob)
        out_M4.copy_(torch.stack([x.double() for x in found], dim=-1))
        self.remaining[slot] -= 1
        self.sampling.counter[slot] += 1
        stopped = (token[:, None] == self.stop_SJ[slot]).any(1)
        goes_on = (slot != self.idle) & finite & ~stopped & (self.remaining[slot] > 0)
        self.live[slot] = goes_on
        position = torch.where(goes_on, self.runner.position[slot] + 1, 0)
        return torch.where(goes_on, slot, self.idle), token, position

    def _oldest(self, wanted: Tensor, count: int) -> Tensor:
        """The oldest wanted slots, filled up with the idle one."""
        slot = torch.where(wanted, self.age, _NEVER).argsort()[:count]
        return torch.where(wanted[slot], slot, self.idle)


class _Mail:
    """A tensor on the device, ``device``, with a twin on the host that copies pass through: pinned,
    so that the host does not wait for what it sends."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.device = torch.zeros(shape, dtype=dtype, device=device)
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def send(self, x: Tensor) -> None:
        """Put this at the beginning. Nothing sent earlier may still be under way."""
        self.host[: len(x)] = x
        self.device[: len(x)].copy_(self.host[: len(x)], non_blocking=True)

    def fetch(self) -> np.ndarray:
        """All of it, when the device has done what it was given."""
        self.host.copy_(self.device, non_blocking=True)
        if self.device.is_cuda:
            torch.cuda.current_stream(self.device.device).synchronize()
        return self.host.numpy()


_NUMBERS = 5 + MAX_STOP_TOKENS + len(fields(SamplingRows))
"""That tell of a request that starts."""


def _size(requests: int) -> int:
    """What a start is sized for: 2, 8, 32 and so on, so that there are few graphs."""
    size = 2
    while size < requests:
        size *= 4
    return size


def _stops(params: SamplingParams) -> list[int]:
    """Its first stop tokens, filled up with what no token is. The host stops at all of them; the
    device spares itself the tokens after one."""
    first = params.stop_token_ids[:MAX_STOP_TOKENS]
    return [*first, *[-1] * (MAX_STOP_TOKENS - len(first))]
