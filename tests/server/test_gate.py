"""Who is let in: keys, types, sizes, bodies that do not come, origins."""

import asyncio
import socket

import pytest

from mor.server.gate import Gate
from tests.server.served import running

JSON = {"content-type": "application/json"}


def ask(gate_settings=None, *, method="POST", path="/v1/completions", headers=None, body=(b"{}",)):
    """(status, headers, body) of a request whose body comes in pieces; None: one never comes. The
    app behind the gate answers with the body that it gets."""

    async def app(scope, receive, send):
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message.get("body", b"")})

    left, sent = list(body), []

    async def receive():
        if left and left[0] is None:
            await asyncio.sleep(3600)
        if not left:
            return {"type": "http.disconnect"}
        piece = left.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    settings = {"keys": (), "max_body_bytes": 100, "read_timeout_s": 0.05} | (gate_settings or {})
    raw = [(k.encode(), v.encode()) for k, v in (JSON if headers is None else headers).items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    asyncio.run(Gate(app, **settings)(scope, receive, send))
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:])


def test_a_body_in_pieces_arrives_whole_and_answers_carry_the_id_of_the_request():
    status, headers, body = ask(body=(b'{"a"', b": 1}"), headers=JSON | {"x-request-id": "mine-1"})
    assert (status, body, headers["x-request-id"]) == (200, b'{"a": 1}', "mine-1")
    _, headers, _ = ask(headers=JSON | {"x-request-id": "bad id\r\n"})
    assert len(headers["x-request-id"]) == 24


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, (b"{}",), 415),
        ({"content-type": "text/plain"}, (b"{}",), 415),
        ({"content-type": "application/json; charset=utf-8"}, (b"{}",), 200),
        (JSON | {"content-length": "101"}, (b"x",), 413),
        (JSON, (b"x" * 60, b"x" * 60), 413),
        (JSON, (b"x", None), 408),
    ],
)
def test_types_sizes_and_slow_bodies(headers, body, status):
    assert ask(headers=headers, body=body)[0] == status


KEYS = {"keys": ("first", "second")}


@pytest.mark.parametrize(
    "sent", [None, "Bearer third", "Bearer", "Bearer ", "Basic first", "first"]
)
def test_without_a_key_of_the_server_nothing_but_the_page_and_the_health_is_shown(sent):
    headers = JSON | ({} if sent is None else {"authorization": sent})
    for path in (
        "/v1/completions",
        "/v1/models",
        "/metrics",
        "/stats",
        "/openapi.json",
        "/health/",
    ):
        status, answered, body = ask(KEYS, headers=headers, path=path)
        assert status == 401 and answered["www-authenticate"] == "Bearer"
        assert b"invalid_api_key" in body
    for path in ("/", "/health", "/page/start.js"):
        assert ask(KEYS, headers=headers, path=path, method="GET")[0] == 200


def test_every_key_opens():
    for key in ("first", "second"):
        assert ask(KEYS, headers=JSON | {"authorization": f"Bearer {key}"})[0] == 200


def test_other_origins_are_refused_unless_they_are_named():
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization,content-type"
    for allowed in ((), ("https://a.example",)):
        with running(allow_origin=allowed, api_key=("k",)) as server, server.client() as client:
            asked = client.options("/v1/completions", headers=preflight)
            shown = client.get("/v1/models", headers={"Origin": "https://a.example"})
            assert shown.status_code == 401
            for answer in (asked, shown):
                found = answer.headers.get("access-control-allow-origin")
                assert found == (allowed[0] if allowed else None)
            assert (asked.status_code == 200) == bool(allowed)


def test_a_body_that_is_too_long_is_refused_before_it_is_sent_or_after():
    with running(max_body_bytes=1000) as server:
        with server.client() as client:  # which reads no answer before it has sent everything
            for _ in range(2):
                refused = client.post("/v1/completions", content=b"1" * 20_000_000, headers=JSON)
                assert refused.status_code == 413
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.server.port)) as client:
            client.sendall(head + b"Content-Length: 1001\r\nExpect: 100-continue\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 413")
