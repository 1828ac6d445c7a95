"""What happens between an answer and its client: events, and clients that leave or do not read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mor.server.choices import Form, event
from mor.server.engine_thread import Answer
from mor.server.errors import UNFORESEEN, ApiError

LOG = logging.getLogger("mor.server")
T = TypeVar("T")
_TRANSPORT = "mor.transport"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # or nginx keeps events back
}


class WithTransport:
    """Remembers a request's transport, by which a connection can be broken: ASGI itself has no way
    to leave a client that does not read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[_TRANSPORT] = getattr(getattr(send, "__self__", None), "transport", None)
        await self.app(scope, receive, send)


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What ``work`` gives; None, with the work cancelled, if the client leaves before. (Handlers of
    answers that are not streamed hear nothing of it by themselves.)"""
    made, left = asyncio.create_task(work), asyncio.create_task(gone(request.receive))
    try:
        await asyncio.wait({made, left}, return_when=asyncio.FIRST_COMPLETED)
        return made.result() if made.done() else None
    finally:
        await _end(made, left)


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def before(timeout_s: float, work: Awaitable[T]) -> T:
    """What ``work`` gives. Raises ApiError 504 if it takes longer."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise ApiError(
            504, f"the answer took longer than {timeout_s:g} s", code="timeout"
        ) from None


async def events(form: Form, answer: Answer, timeout_s: float) -> AsyncIterator[bytes]:
    """The events of an answer, several together if they came together."""
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    first = b"".join(form.chunk([choice], answer) for choice in form.begin())
    while True:
        left_s = max(0.0, deadline_s - asyncio.get_running_loop().time())
        outputs = await before(left_s, answer.arrived())
        if not outputs:
            break
        yield first + b"".join(form.events(answer, outputs))
        first = b""
    yield form.end(answer)


class EventStream(Response):
    """An answer as server-sent events.

    What goes wrong after the first byte is told in an event, and then the connection breaks without
    an end: some clients notice the one, some the other. A client that leaves ends the answer, and
    so does one that does not take an event within ``write_timeout_s``.
    """

    def __init__(
        self,
        form: Form,
        answer: Answer,
        *,
        headers: Mapping[str, str],
        timeout_s: float,
        write_timeout_s: float,
    ) -> None:
        super().__init__(headers={**HEADERS, **headers})
        del self.headers["content-length"]
        self._form, self._answer = form, answer
        self._timeout_s, self._write_timeout_s = timeout_s, write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._answer:
            written = asyncio.create_task(self._write(send))
            left = asyncio.create_task(gone(receive))
            try:
                await asyncio.wait({written, left}, return_when=asyncio.FIRST_COMPLETED)
                if written.done() and not written.result():
                    self._break(scope, at_once=False)
            except TimeoutError:
                LOG.warning("a client did not read for %g s and is cut off", self._write_timeout_s)
                self._break(scope, at_once=True)
            finally:
                await _end(written, left)

    async def _write(self, send: Send) -> bool:
        """Whether the answer was written to its end. Raises TimeoutError if the client does not
        read."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in events(self._form, self._answer, self._timeout_s):
                await self._send(send, chunk)
        except ApiError as error:
            await self._send(send, event(error.body))
            return False
        except TimeoutError:
            raise
        except Exception as error:
            LOG.exception("an answer failed", exc_info=error)
            await self._send(send, event(ApiError(500, UNFORESEEN).body))
            return False
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True

    async def _send(self, send: Send, chunk: bytes) -> None:
        async with asyncio.timeout(self._write_timeout_s):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

    @staticmethod
    def _break(scope: Scope, *, at_once: bool) -> None:
        transport = scope.get(_TRANSPORT)
        if transport is not None:
            transport.abort() if at_once else transport.close()
