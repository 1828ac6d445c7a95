"""Connections before there is a request: heads that are too long or do not come."""

import json
import socket
import time
from contextlib import contextmanager

import pytest

from tests.server.served import running

HEAD = b"GET /health HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def hasty():
    with running(max_header_bytes=2000, read_timeout_s=0.4) as found:
        yield found


@contextmanager
def connected(server):
    with socket.create_connection(("127.0.0.1", server.server.port), timeout=30) as client:
        yield client


def rest(client):
    """All that comes until the server hangs up."""
    found = b""
    try:
        while piece := client.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def error(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "pieces",
    [
        [HEAD + b"X-Long: ", *[b"a" * 500] * 5],
        [HEAD, *[b"X-%d: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" % i for i in range(100)]],
        [b"GET /" + b"a" * 2500],
    ],
)
def test_a_head_that_is_too_long_is_refused_before_it_is_whole(hasty, pieces):
    with connected(hasty) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        status, said = error(rest(client))
    assert status == 431 and "2,000 bytes" in said["message"]


def test_what_follows_a_body_is_a_head_as_well():
    with running(max_header_bytes=2000) as server, connected(server) as client:
        client.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX-Long: ")
        time.sleep(0.05)  # what is read at one go with a body counts as body
        client.sendall(b"a" * 2500)
        assert b" 431 " in rest(client)


def test_a_connection_without_a_whole_head_is_closed_in_time(hasty):
    with connected(hasty) as silent, connected(hasty) as slow:
        slow.sendall(HEAD)
        assert rest(silent) == b""
        status, said = error(rest(slow))
    assert status == 408 and "did not arrive within 0.4 s" in said["message"]


def test_the_next_request_of_a_connection_has_the_same_limits(hasty):
    with connected(hasty) as client:
        client.sendall(HEAD + b"\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.sendall(b"\r\n")  # which is no request
        assert rest(client) == b""
    with connected(hasty) as client:
        client.sendall(HEAD + b"\r\n" + HEAD)
        assert rest(client).count(b"HTTP/1.1 200") == 1


def test_what_is_no_http_is_told_so_in_json(hasty):
    with connected(hasty) as client:
        client.sendall(b"hello\r\n\r\n")
        status, said = error(rest(client))
    assert status == 400 and said["type"] == "invalid_request_error"


def test_a_body_that_does_not_come_keeps_no_server_from_ending():
    with running(drain_s=600, read_timeout_s=600) as server, connected(server) as client:
        client.sendall(POST + b"Content-Length: 10\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100")
        server.server.should_exit = True
        assert error(rest(client))[0] == 503


def test_load_balancers_may_ask_for_heads_alone(hasty):
    with hasty.client() as client:
        for path in ("/", "/health"):
            assert client.head(path).status_code == 200
