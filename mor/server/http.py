"""The connection before there is a request: how long its head may be, and how long it may take.

uvicorn limits neither with httptools, and what comes before a request reaches no middleware.
"""

from __future__ import annotations

import asyncio
import http
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mor.server.errors import ApiError


class HeadsLimited(HttpToolsProtocol):
    """Refuses with 431 a head, or what follows a body, that is too long; closes a connection on
    which none comes in time, with 408 if a part of one came. Errors are OpenAI's, in JSON."""

    max_head_bytes: int
    head_timeout_s: float
    _unparsed = 0
    """Bytes since a head or a piece of a body was complete."""
    _deadline: asyncio.TimerHandle | None = None
    _has_begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_longer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unparsed += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._unparsed > self.max_head_bytes:
            self._refuse(
                ApiError(431, f"the headers are longer than {self.max_head_bytes:,} bytes")
            )
        elif self._deadline is None and not self._is_answering:
            self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun = True
        if self._deadline is None:
            self._wait()

    def on_headers_complete(self) -> None:
        self._unparsed, self._has_begun = 0, False
        self._wait_no_longer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def shutdown(self) -> None:
        """At the end of the server: a request whose body has not come yet is not waited for."""
        if self._is_answering and self.cycle.more_body and not self.cycle.response_started:
            self._refuse(ApiError(503, "the server is shutting down", code="draining"))
        else:
            super().shutdown()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(self.head_timeout_s, self._expire)

    def _wait_no_longer(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if self._is_answering:  # an earlier request, whose answer comes first
            self._wait()
        elif self._has_begun:
            said = f"the headers did not arrive within {self.head_timeout_s:g} s"
            self._refuse(ApiError(408, said))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer and hang up, unless an answer is under way: then only hang up."""
        if not self.transport.is_closing():
            if not (self._is_answering and self.cycle.response_started):
                self.transport.write(_response(error))
            self.transport.close()


def _response(error: ApiError) -> bytes:
    body = json.dumps(error.body).encode()
    head = (
        f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


def heads_limited(max_head_bytes: int, head_timeout_s: float) -> type[Any]:
    """The protocol with these limits, for uvicorn, which makes one for each connection."""
    limits = {"max_head_bytes": max_head_bytes, "head_timeout_s": head_timeout_s}
    return type("HeadsLimited", (HeadsLimited,), limits)
