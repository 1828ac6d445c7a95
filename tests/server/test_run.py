"""The server's life: loading, serving, draining, ending."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from mor.server.run import Server, run
from tests.engine.requests import all_memory_is_back
from tests.server.served import make_engine, make_service, running, wait_until

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "old_run"
LONG = {"prompt": "a", "max_tokens": 60, "ignore_eos": True}


def test_health_is_503_until_the_model_is_loaded():
    may_load = threading.Event()

    def make():
        may_load.wait()
        return make_engine()

    service = make_service(make)
    server = Server(service)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        wait_until(lambda: server.started)
        base = service.config.url(server.port)
        with httpx2.Client(base_url=base, trust_env=False, timeout=60) as client:
            for path in ("/health", "/v1/models", "/stats"):
                found = client.get(path)
                assert found.status_code == 503 and found.headers["retry-after"] == "5"
                assert found.json()["error"]["code"] == "loading"
            assert client.post("/v1/completions", json=LONG).status_code == 503
            may_load.set()
            wait_until(lambda: client.get("/health").status_code == 200)
    finally:
        may_load.set()
        server.should_exit = True
        thread.join()


def test_what_cannot_be_loaded_ends_the_server_with_the_reason():
    def make():
        raise ValueError("no such model")

    said = []
    with pytest.raises(ValueError, match="no such model"):
        run(make_service(make), said.append)
    assert said == []


def test_an_address_that_is_taken_is_a_mistake_of_the_user():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on 127.0.0.1 port {port}"):
            run(make_service(port=port), print)


def shut_down_with(drain_s, stream):
    """What a long answer gives when the server is told to end while it is written."""
    with running(drain_s=drain_s) as server, ThreadPoolExecutor(1) as other:
        engine = server.engine
        with server.client() as client:
            asked = other.submit(client.post, "/v1/completions", json=LONG | {"stream": stream})
            wait_until(lambda: any(len(r.token_ids) > 2 for r in list(engine.requests.values())))
            engine.may_go.clear()
            server.server.should_exit = True
            wait_until(lambda: server.service.thread.state == "draining")
            if drain_s > 1:
                engine.may_go.set()
            error = asked.exception()
            found = None if error else asked.result()
        server.thread.join()
        all_memory_is_back(engine)
    return found if error is None else error


@pytest.mark.parametrize("stream", [True, False])
def test_answers_end_while_the_server_drains(stream):
    found = shut_down_with(60, stream)
    assert found.status_code == 200
    assert "[DONE]" in found.text if stream else found.json()["usage"]["completion_tokens"] == 60


def test_answers_that_take_too_long_then_are_ended_with_an_error():
    assert isinstance(shut_down_with(0.1, True), httpx2.RemoteProtocolError)
    refused = shut_down_with(0.1, False)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"


@pytest.fixture(scope="module")
def process():
    """`mor serve` of a small run, and its address."""
    command = [sys.executable, "-m", "mor", "serve", str(OLD_RUN), "--port", "0", "--drain-s", "60"]
    environment = os.environ | {"MOR_API_KEY": "secret-1 secret-2"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as started:
        line = started.stdout.readline()
        yield started, line
        started.kill()


def test_a_process_serves_and_ends_in_order_when_it_is_told_to(process):
    started, line = process
    name, url = line.split(" (")[0].split(": ")
    assert (name, url.endswith("/v1")) == ("old_run", True)
    body = {"prompt": "The state", "max_tokens": 40, "stream": True, "ignore_eos": True}
    base = dict(base_url=url, timeout=60, trust_env=False)
    with httpx2.Client(**base, headers={"Authorization": "Bearer secret-2"}) as client:
        assert client.get("/models").json()["data"][0]["id"] == "old_run"
        assert httpx2.get(f"{url}/models", trust_env=False).status_code == 401
        with client.stream("POST", "/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            started.send_signal(signal.SIGTERM)
            rest = list(lines)
    assert rest[-1] == "data: [DONE]" and len(rest) == 40
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert started.wait(60) == 0
    assert started.stderr.read() == ""


def test_a_second_signal_ends_the_answers_and_the_engine_s_thread_with_them():
    with running(drain_s=60) as server, server.client() as client, ThreadPoolExecutor(1) as other:
        server.engine.may_go.clear()
        asked = other.submit(client.post, "/v1/completions", json=LONG)
        wait_until(lambda: server.engine.requests)
        thread = server.service.thread
        for state in ("ready", "draining"):
            wait_until(lambda state=state: thread.state == state)
            thread._loop.call_soon_threadsafe(server.server.handle_exit, signal.SIGINT, None)
        refused = asked.result()
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        server.thread.join()
        assert not thread._thread.is_alive()


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs HAProxy")
@pytest.mark.slow
def test_two_servers_behind_the_page_s_load_balancer_share_requests_and_a_dead_one_gets_none(
    tmp_path,
):
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    settings = re.search(r"```text\n(# haproxy.*?)```", page, flags=re.DOTALL)[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with running() as one, running() as two:
        for ours, theirs in ((8000, port), (8001, one.server.port), (8002, two.server.port)):
            settings = settings.replace(f"127.0.0.1:{ours}", f"127.0.0.1:{theirs}")
        (tmp_path / "mor.cfg").write_text(settings)
        base = dict(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60)
        started = subprocess.Popen(["haproxy", "-db", "-f", str(tmp_path / "mor.cfg")])
        try:
            with httpx2.Client(**base) as client, ThreadPoolExecutor(8) as crowd:
                wait_until(lambda: _answers(client))

                def ask(seed):
                    body = LONG | {"seed": seed, "stream": seed % 2 == 0}
                    return client.post("/v1/completions", json=body)

                assert {found.status_code for found in crowd.map(ask, range(12))} == {200}
                assert one.engine.steps > 0 and two.engine.steps > 0
                one.service.thread._died(RuntimeError("the device is lost"))
                wait_until(lambda: all(_answers(client) for _ in range(4)))
                assert {found.status_code for found in crowd.map(ask, range(6))} == {200}
        finally:
            started.terminate()
            started.wait()


def _answers(client):
    try:
        return client.get("/health").status_code == 200
    except httpx2.TransportError:
        return False
