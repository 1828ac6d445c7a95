"""What a step strategy works with, and what it has to do.

M requests of a batch · V vocab
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mor.engine.request import FinishReason, Phase, Request, RequestOutput
from mor.engine.runner import Runner
from mor.engine.sampling import Drawn, next_tokens
from mor.engine.scheduler import Scheduler


def not_finite(tokens: int) -> str:
    return (
        f"the logits after {tokens} tokens are not finite; the model's weights hold or lead to inf "
        "or nan"
    )


class Measurements:
    """Seconds spent in each part of the work, and how many passes and tokens it did there."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.passes: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()

    @contextmanager
    def part(self, name: str, tokens: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start
        self.passes[name] += 1
        self.tokens[name] += tokens

    def clear(self) -> None:
        for counter in (self.seconds, self.passes, self.tokens):
            counter.clear()


class Work:
    """What an engine shares with its step strategy: the running requests, the model with its cache,
    measurements, and the tokens that have come out.

    lanes: tokens in one pass of the shared block at most.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, *, lanes: int) -> None:
        self.runner, self.kv, self.scheduler, self.lanes = runner, runner.kv, scheduler, lanes
        self.requests: dict[str, Request] = {}
        """Unfinished ones, by id."""
        self.streams: dict[str, deque[RequestOutput]] = {}
        """By id of request, where else its outputs go."""
        self.measured = Measurements()
        self._outputs: list[RequestOutput] = []

    def in_phase(self, phase: Phase) -> list[Request]:
        """Running requests in this phase, oldest first."""
        return [request for request in self.scheduler.running if request.phase is phase]

    def slots(self, requests: Sequence[Request]) -> Tensor:
        slots = np.array([request.slot for request in requests], dtype=np.int64)
        return torch.from_numpy(slots).to(self.kv.device)

    def sample(self, requests: Sequence[Request], depths: Sequence[int], logits_MV: Tensor) -> None:
        """Draw and take the next token of each request. depths: recursions of the tokens that these
        logits come from."""
        with self.measured.part("sample", len(requests)):
            found = next_tokens(logits_MV, [request.answer for request in requests])
        for request, drawn, depth in zip(requests, found, depths, strict=True):
            request.phase = Phase.ENTER
            self.take(request, drawn, depth=depth)

    def take(self, request: Request, drawn: Drawn, *, depth: int) -> None:
        """Record a request's next token. The request finishes if that was the last, or if there is
        none.

        depth: recursions of the token that predicted it, which is read now.
        """
        if drawn.token_id is None:
            self.fail(request, drawn.error or not_finite(len(request.known_ids)))
            return
        params = request.params
        request.depths.append(depth)
        request.num_read += 1
        text = request.answer.take(drawn.token_id)
        logprob = drawn.logprob if params.logprobs else None
        if logprob is not None:
            request.logprobs.append(logprob)
        top = drawn.top if params.top_logprobs else None
        if top is not None:
            request.top_logprobs.append(top)
        reason = request.answer.finish_reason
        if reason is not None:
            self.finish(request, reason)
        self.put_out(RequestOutput(request, drawn.token_id, depth, logprob, reason, text, top))

    def fail(self, request: Request, error: str) -> None:
        """End a request without a further token."""
        request.error = error
        self.finish(request, "error")
        self.put_out(RequestOutput.without_token(request))

    def finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        del self.requests[request.request_id]
        self.scheduler.finish(request)

    def put_out(self, output: RequestOutput) -> None:
        self._outputs.append(output)
        if (stream := self.streams.get(output.request.request_id)) is not None:
            stream.append(output)

    def collect(self) -> list[RequestOutput]:
        """What has come out since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs


class Strategy(ABC):
    """How running requests get their next tokens. An engine has one, for all its life.

    static_shapes: the runner must size attention by the longest request and look no value up on the
    device.
    """

    static_shapes: ClassVar[bool] = False

    def __init__(self, work: Work) -> None:
        self.work = work

    def admit(self) -> None:
        """Let waiting requests run."""
        self.work.scheduler.admit()

    @abstractmethod
    def step(self) -> None:
        """Some work for the requests that have read their prompts."""
