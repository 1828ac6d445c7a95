"""What a request must have before anybody looks into it: a key, a type, a size, and its body in
time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mor.server.errors import ApiError

OPEN_PATHS = ("/", "/health")
OPEN_FOLDER = "/page/"
"""What needs no key: whether the server is well, and the page, which asks for one."""
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Gate:
    """Refuses with 401, 408, 413 and 415, reads the body, and gives every answer the id of its
    request (``X-Request-Id``, that of the client if it sent one).

    A type other than JSON is refused also because browsers send some to any address without asking
    first.
    """

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[str], max_body_bytes: int, read_timeout_s: float
    ) -> None:
        self.app = app
        self._keys = [_digest(key) for key in keys]
        self._max_body_bytes, self._read_timeout_s = max_body_bytes, read_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(12)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault("X-Request-Id", request_id)
            await send(message)

        try:
            self._check_key(scope, headers)
            body = await self._body(scope, headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, named)
            return
        await self.app(scope, receive if body is None else _replaying(body, receive), named)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        path: str = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        if not self._keys or is_open or scope["method"] == "OPTIONS":
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        # All are compared, so that the time says nothing of which was near.
        known = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(
                401,
                "the request needs a key of this server: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes | None:
        """The body of a request that has one; None for one that has left."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise ApiError(415, "the body must be JSON: Content-Type: application/json")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise self._too_long()
        try:
            async with asyncio.timeout(self._read_timeout_s):
                return await self._read(receive)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {self._read_timeout_s:g} s",
                headers={"Connection": "close"},
            ) from None

    async def _read(self, receive: Receive) -> bytes | None:
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                raise self._too_long()
        return bytes(body)

    def _too_long(self) -> ApiError:
        # No "Connection: close": uvicorn reads on, or many clients would see a broken connection.
        return ApiError(413, f"the body is longer than {self._max_body_bytes:,} bytes")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _replaying(body: bytes, receive: Receive) -> Receive:
    """The body in one message, and then what else comes."""
    left = [body]

    async def replay() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return replay
