"""One thread owns the engine; the event loop only waits.

Commands go to the thread through a queue and are done between two steps. What a step yields comes
back in one piece, and is then laid out by answer: an :class:`Answer` holds what the engine's
requests of one HTTP request have written and nobody has read yet.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self

from mor.engine import Engine, Request, RequestOutput, SamplingParams, Status
from mor.server.errors import UNFORESEEN, ApiError

LOG = logging.getLogger("mor.server")
SPEED_S = 2.0
"""Over how long tokens per second are counted."""
SNAPSHOT_S = 0.05
"""How often the thread looks at the engine's counters while it works."""


class Job(NamedTuple):
    """A prompt and how to continue it."""

    prompt_ids: list[int]
    params: SamplingParams


class Observer(Protocol):
    """Who counts what happens. All is called in the event loop."""

    def step(self, seen: Step) -> None: ...

    def ended(self, request: Request, reason: str, now_s: float) -> None: ...


class Step(NamedTuple):
    """What a step did, beside its outputs. started: requests that got a slot."""

    outputs: list[RequestOutput]
    started: list[Request]
    now_s: float
    stats: dict[str, Any] | None
    """The engine's, now and then."""


class Answer:
    """What the jobs of one HTTP request write. Leaving its block ends the jobs that still run.

    streamed: keep every output until it is read, at most ``max_unread`` for each job; otherwise
    only wait for the end. ``requests`` are the engine's, in the order of the jobs.
    """

    def __init__(self, owner: EngineThread, jobs: Sequence[Job], *, streamed: bool) -> None:
        self.jobs, self.streamed = list(jobs), streamed
        self.requests: list[Request] = []
        self.is_open = True
        self.num_unfinished = len(self.jobs)
        self._owner = owner
        self._arrived: list[tuple[int, RequestOutput]] = []
        self._failure: ApiError | None = None
        self._changed = asyncio.Event()

    async def arrived(self) -> list[tuple[int, RequestOutput]]:
        """Outputs since the last call, each with the place of its job, as soon as there are some;
        none when all jobs have ended. Raises ApiError if the answer was ended from outside."""
        while not self._arrived and self.num_unfinished and self._failure is None:
            self._changed.clear()
            await self._changed.wait()
        found, self._arrived = self._arrived, []
        if not found and self._failure is not None:
            raise self._failure
        return found

    async def finished(self) -> list[Request]:
        """The engine's requests, when all have ended. Raises ApiError as above, and if one of them
        ended with an error."""
        while self.num_unfinished and self._failure is None:
            self._changed.clear()
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure
        if any(request.finish_reason == "error" for request in self.requests):
            raise ApiError(500, FAILED)
        return self.requests

    def put(self, place: int, output: RequestOutput, max_unread: int) -> None:
        if output.finish_reason is not None:
            self.num_unfinished -= 1
        if self.streamed:
            self._arrived.append((place, output))
            if len(self._arrived) > max_unread * len(self.jobs):
                self.fail(ApiError(408, "the answer was not read fast enough", code="slow_reader"))
                return
        if self.streamed or not self.num_unfinished:
            self._changed.set()

    def fail(self, error: ApiError) -> None:
        """End it with an error that its reader gets next."""
        self._failure = error
        self._arrived.clear()
        self.close()
        self._changed.set()

    def close(self) -> None:
        """End the jobs that still run."""
        if self.is_open:
            self.is_open = False
            self._owner.forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


FAILED = "the model could not finish this answer; the server's log has the reason"
_State = Literal["loading", "ready", "draining", "dead"]


class EngineThread:
    """Runs an engine that ``make`` builds, in a thread of its own.

    max_waiting: jobs beyond the engine's slots at a time. max_unread: see :class:`Answer`.
    All methods are for the event loop that called :meth:`start`.
    """

    def __init__(
        self, make: Callable[[], Engine], observer: Observer, *, max_waiting: int, max_unread: int
    ) -> None:
        self._make, self._observer = make, observer
        self._max_waiting, self._max_unread = max_waiting, max_unread
        self.state: _State = "loading"
        self.error: BaseException | None = None
        """Why it is dead."""
        self.num_unfinished = 0
        """Jobs under way."""
        self.stats: dict[str, Any] = {}
        self._answers: dict[str, tuple[Answer, int]] = {}  # by id of the engine's request
        self._undecided = set[asyncio.Future[None]]()  # whether the engine takes the jobs
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._stopping = False
        self._mean_s = 1.0  # of an answer, the newest count most
        self._written = deque[tuple[float, int]]()  # when, and how many tokens
        self._thread = threading.Thread(target=self._run, name="mor-engine", daemon=True)

    # In the event loop.

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._settled = asyncio.Event()
        self._thread.start()

    async def settled(self) -> Engine:
        """The engine, once it is made. Raises what making it raised."""
        await self._settled.wait()
        if self.error is not None:
            raise self.error
        return self._engine

    def check_open(self) -> Engine:
        """The engine; raises ApiError 503 while there is none that takes requests."""
        if self.state == "ready":
            return self._engine
        said = {
            "loading": "the model is being loaded",
            "draining": "the server is shutting down",
            "dead": "the engine has stopped; restart the server",
        }[self.state]
        headers = {"Retry-After": "5"} if self.state == "loading" else {}
        raise ApiError(503, said, code=self.state, headers=headers)

    async def submit(self, jobs: Sequence[Job], *, streamed: bool) -> Answer:
        """Queue jobs, all or none. Raises ApiError 429 if too many wait, 400 for what the engine
        refuses."""
        engine = self.check_open()
        self._check_room(len(jobs), engine.config.max_num_seqs)
        answer = Answer(self, jobs, streamed=streamed)
        self.num_unfinished += len(jobs)
        accepted: asyncio.Future[None] = self._loop.create_future()
        self._undecided.add(accepted)
        self._commands.put(lambda: self._add(answer, accepted))
        try:
            await accepted
        except BaseException:
            answer.close()
            raise
        finally:
            self._undecided.discard(accepted)
        return answer

    def _check_room(self, count: int, slots: int) -> None:
        most = slots + self._max_waiting
        if count > most:
            raise ApiError(400, f"this asks for {count} answers, the server takes {most} at a time")
        if self.num_unfinished + count > most:
            waiting = max(1, self.num_unfinished - slots)
            after_s = min(60, math.ceil(self._mean_s * waiting / slots))
            raise ApiError(
                429,
                f"{self.num_unfinished} answers are under way or wait, the most is {most}; try "
                "again later",
                code="overloaded",
                headers={"Retry-After": str(after_s)},
            )

    def forget(self, answer: Answer) -> None:
        """End what of an answer still runs."""
        self.num_unfinished -= answer.num_unfinished
        for request in answer.requests:
            if self._answers.pop(request.request_id, None) is not None:
                self._observer.ended(request, "abort", time.monotonic())
        if answer.num_unfinished:
            self._commands.put(lambda: self._abort(answer))

    @property
    def tokens_per_second(self) -> float:
        """New tokens in the last seconds."""
        since_s = time.monotonic() - SPEED_S
        return sum(count for when_s, count in self._written if when_s >= since_s) / SPEED_S

    def drain(self) -> None:
        """Take no more requests."""
        if self.state == "ready":
            self.state = "draining"

    def abort_all(self, error: ApiError) -> None:
        """End all answers with this error."""
        for accepted in self._undecided:
            self._refused(error, accepted)
        for answer in {id(answer): answer for answer, _ in self._answers.values()}.values():
            answer.fail(error)

    async def stop(self) -> None:
        """End everything, and the thread."""
        self.abort_all(ApiError(503, "the server is shutting down"))
        self._commands.put(self._stop)
        if self.state != "loading":
            await asyncio.to_thread(self._thread.join)

    def _ready(self) -> None:
        self.state = "ready"
        self._settled.set()

    def _died(self, error: BaseException) -> None:
        self.state, self.error = "dead", error
        self._settled.set()
        self.abort_all(ApiError(500, "the engine has stopped", code="dead"))

    def _accepted(self, answer: Answer, accepted: asyncio.Future[None]) -> None:
        if answer.is_open:
            for place, request in enumerate(answer.requests):
                self._answers[request.request_id] = answer, place
        if not accepted.done():
            accepted.set_result(None)

    def _refused(self, error: ApiError, accepted: asyncio.Future[None]) -> None:
        if not accepted.done():
            accepted.set_exception(error)

    def _take(self, seen: Step) -> None:
        if seen.stats is not None:
            self.stats = seen.stats
        # Of those whose reader has left meanwhile, the observer has heard the end already.
        known = [request for request in seen.started if request.request_id in self._answers]
        self._observer.step(seen._replace(started=known))
        self._written.append((seen.now_s, len(seen.outputs)))
        while self._written[0][0] < seen.now_s - SPEED_S:
            self._written.popleft()
        for output in seen.outputs:
            answer, place = self._answers.get(output.request.request_id, (None, 0))
            if answer is None:
                continue  # its reader is gone
            if output.finish_reason is not None:
                del self._answers[output.request.request_id]
                self._finish(output.request, output.finish_reason, seen.now_s)
            answer.put(place, output, self._max_unread)

    def _finish(self, request: Request, reason: str, now_s: float) -> None:
        self.num_unfinished -= 1
        self._mean_s += 0.1 * (now_s - request.arrival_s - self._mean_s)
        self._observer.ended(request, reason, now_s)
        if request.error is not None:
            LOG.error("request %s: %s", request.request_id, request.error)

    # In the thread.

    def _run(self) -> None:
        try:
            self._engine = self._make()
            self._waiting: list[Request] = []
            self._looked_s = 0.0
            self._call(self._ready)
            while not self._stopping:
                self._obey(wait=not self._engine.has_unfinished)
                if self._engine.has_unfinished:
                    self._step()
        except BaseException as error:
            if self.state != "loading":
                LOG.exception("the engine has stopped", exc_info=error)
            self._call(self._died, error)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _obey(self, *, wait: bool) -> None:
        if wait:
            self._look(time.monotonic(), [], at_once=True)
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _stop(self) -> None:
        self._stopping = True

    def _add(self, answer: Answer, accepted: asyncio.Future[None]) -> None:
        own: list[Request] = []
        try:
            for job in answer.jobs:
                own.append(self._engine.add_request(job.prompt_ids, job.params))
        except (ValueError, ImportError) as error:
            for request in own:
                self._engine.abort(request)
            self._call(self._refused, ApiError(400, str(error)), accepted)
        except Exception as error:
            for request in own:
                self._engine.abort(request)
            LOG.exception("a request could not be added", exc_info=error)
            self._call(self._refused, ApiError(500, UNFORESEEN), accepted)
        else:
            answer.requests = own
            self._waiting += own
            self._call(self._accepted, answer, accepted)

    def _abort(self, answer: Answer) -> None:
        for request in answer.requests:
            self._engine.abort(request)

    def _step(self) -> None:
        outputs, now_s = self._engine.step(), time.monotonic()
        left = [request for request in self._waiting if request.status is not Status.WAITING]
        if left:
            self._waiting = [r for r in self._waiting if r.status is Status.WAITING]
        started = [r for r in left if r.status is Status.RUNNING or r.token_ids]  # not aborted
        self._look(now_s, outputs, started)

    def _look(
        self,
        now_s: float,
        outputs: list[RequestOutput],
        started: Sequence[Request] = (),
        *,
        at_once: bool = False,
    ) -> None:
        stats = None
        if at_once or now_s - self._looked_s > SNAPSHOT_S:
            stats, self._looked_s = self._engine.stats(), now_s
            pools = self._engine.kv.pools
            stats["pages"] = sum(pool.num_pages for pool in pools)
            stats["pages_used"] = stats["pages"] - sum(pool.num_free for pool in pools)
        if outputs or started or stats:
            self._call(self._take, Step(outputs, list(started), now_s, stats))
