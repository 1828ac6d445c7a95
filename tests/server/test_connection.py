"""Clients that leave, do not read, or are told of an error in the middle of an answer."""

import asyncio
import json

import httpx2
import pytest

from mor.server.connection import before, gone, unless_gone
from mor.server.errors import ApiError
from tests.engine.requests import all_memory_is_back
from tests.server.served import make_service, running, wait_until

BODY = {"prompt": "abc", "max_tokens": 100, "ignore_eos": True, "stream": True}


class Client:
    """The other end of an ASGI application. blocked: it takes no event after the first."""

    def __init__(self, body, *, blocked=False):
        self.sent, self.left, self.blocked = [], asyncio.Event(), blocked
        self.aborted = False
        self.transport = self
        self._body = json.dumps(body).encode()

    def abort(self):
        self.aborted = True

    async def receive(self):
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if self.blocked and len(self.sent) == 2:
            await asyncio.sleep(3600)
        self.sent.append(message)

    async def ask(self, app):
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await app(scope, self.receive, self.send)


def in_app(test, **config):
    """Run a test with an application in this loop, and look that nothing is left behind."""
    from mor.server.app import make_app

    async def run():
        service = make_service(**config)
        service.thread.start()
        engine = await service.thread.settled()
        try:
            await test(make_app(service), service)
            while service.thread.num_unfinished or engine.requests:
                await asyncio.sleep(0.001)
            all_memory_is_back(engine)
            assert len(asyncio.all_tasks()) == 1
        finally:
            await service.thread.stop()

    asyncio.run(run())


def test_a_client_that_does_not_read_is_cut_off_and_the_others_are_served():
    async def check(app, service):
        slow, other = Client(BODY, blocked=True), Client(BODY | {"max_tokens": 50})
        await asyncio.gather(slow.ask(app), other.ask(app))
        assert slow.aborted and len(slow.sent) == 2
        assert not other.aborted and other.sent[-1] == {
            "type": "http.response.body",
            "body": b"",
            "more_body": False,
        }

    in_app(check, max_unread=16, write_timeout_s=0.2)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(stream):
    async def check(app, service):
        client = Client(BODY | {"stream": stream})
        asked = asyncio.create_task(client.ask(app))
        while not service.thread.num_unfinished:
            await asyncio.sleep(0)
        client.left.set()
        await asked
        assert service.thread.num_unfinished == 0

    in_app(check)


def test_a_request_that_is_cancelled_ends_its_answer():
    """As when a server stops waiting for it."""

    async def check(app, service):
        for stream in (True, False):
            asked = asyncio.create_task(Client(BODY | {"stream": stream}).ask(app))
            while not service.thread.num_unfinished:
                await asyncio.sleep(0)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            assert service.thread.num_unfinished == 0

    in_app(check)


def test_an_unforeseen_failure_in_mid_stream_is_an_event_and_a_broken_connection(monkeypatch):
    from mor.server import choices

    def broken(*_):
        raise RuntimeError("at /secret/place")

    monkeypatch.setattr(choices.CompletionForm, "delta", broken)
    with running() as server, server.client() as client:
        read, cut = b"", pytest.raises(httpx2.RemoteProtocolError)
        with cut, client.stream("POST", "/v1/completions", json=BODY) as response:
            for chunk in response.iter_raw():
                read += chunk
        assert b'data: {"error":' in read and b"DONE" not in read and b"secret" not in read
        wait_until(lambda: not server.engine.requests)


def test_work_ends_when_the_client_has_gone_first():
    class Asked:
        async def receive(self):
            return {"type": "http.disconnect"}

    class Waits:
        async def receive(self):
            await asyncio.sleep(3600)

    async def run():
        async def slow():
            await asyncio.sleep(3600)

        async def quick():
            return 1

        assert await unless_gone(Asked(), slow()) is None
        assert await unless_gone(Waits(), quick()) == 1
        with pytest.raises(ApiError, match=r"longer than 0\.01 s"):
            await before(0.01, slow())
        await gone(Asked().receive)

    asyncio.run(run())
