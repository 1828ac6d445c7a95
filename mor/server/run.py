"""Runs the application: binds, loads, says so, and ends in order."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from mor.server.app import make_app
from mor.server.errors import ApiError
from mor.server.http import heads_limited
from mor.server.service import Service

LINGER_S = 5
"""After the last answer was ended, before connections are cut."""


class Server(uvicorn.Server):
    """uvicorn's, which drains the engine's thread first. ``started`` and ``should_exit`` are its
    own; ``port`` is the one it listens on."""

    def __init__(self, service: Service) -> None:
        config = service.config
        super().__init__(
            uvicorn.Config(
                make_app(service),
                host=config.host,
                port=config.port,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(config.drain_s) + LINGER_S,
                http=heads_limited(config.max_header_bytes, config.read_timeout_s),
            )
        )
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets the answers end, a second one ends them. uvicorn's own way out
        after a second Ctrl-C would leave the engine's thread behind, at work."""
        if self.should_exit:
            asyncio.get_running_loop().call_soon_threadsafe(self._end_answers)
        self.should_exit = True

    def _end_answers(self) -> None:
        error = ApiError(503, "the server is shutting down", code="draining")
        self.service.thread.abort_all(error)

    @property
    def port(self) -> int:
        found: int = self.servers[0].sockets[0].getsockname()[1]
        return found

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, let the answers end, then end them."""
        thread = self.service.thread
        thread.drain()
        later = asyncio.get_running_loop().call_later(
            self.service.config.drain_s,
            self._end_answers,
        )
        await super().shutdown(sockets)
        later.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A signal is a request to end, and no error once it is done."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(service: Service, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C. say: gets the address once the model is loaded.

    Raises what loading raised, ValueError if the address cannot be had, and RuntimeError if the
    engine has stopped.
    """
    _check_address(service.config.host, service.config.port)
    server = Server(service)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(_serve(server, say))
    if service.thread.error is not None:
        raise service.thread.error


async def _serve(server: Server, say: Callable[[str], None]) -> None:
    async def announce() -> None:
        try:
            while not server.started:
                await asyncio.sleep(0.01)
            await server.service.thread.settled()
        except BaseException:  # serve() goes on to say why
            server.should_exit = True
            return
        say(server.service.config.url(server.port))

    announcing = asyncio.create_task(announce())
    try:
        await server.serve()
    finally:
        announcing.cancel()


def _check_address(host: str, port: int) -> None:
    """Raise ValueError if nobody can listen there: uvicorn would only end the process."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[0][4])
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host} port {port} ({error.strerror}); choose another --host or "
            "--port"
        ) from None
