"""Structures of clients are compiled with a limit of time that nothing else feels."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mor.data.tokenizer import byte_tokenizer
from mor.server.errors import ApiError
from mor.server.structures import MOST_WAITING, PROCESSES, Structures
from mor.structure import Structure
from tests.server.served import make_engine, running, wait_until

TOKENIZER = byte_tokenizer()


def schema(**fields):
    return Structure(kind="json_schema", text=json.dumps(fields))


def for_hours(times=999983):
    """llguidance would be at it for long, and cannot be interrupted."""
    return schema(type="integer", multipleOf=times)


@pytest.fixture
def structures():
    made = Structures(limit_s=0.7)
    yield made
    made.close()


def test_a_costly_structure_is_refused_and_the_others_are_compiled(structures):
    async def run():
        found = await asyncio.gather(
            *(structures.compile(TOKENIZER, for_hours()) for _ in range(3)),
            structures.compile(TOKENIZER, schema(type="object")),
            structures.compile(TOKENIZER, Structure(kind="regex", text="(")),
            return_exceptions=True,
        )
        begun = [process._running for process in structures._all]
        assert all(
            "is too costly: compiling it takes longer than 0.7 s" in str(f) for f in found[:3]
        )
        assert found[3] is None and "cannot be followed" in str(found[4])
        with pytest.raises(ValueError, match="too costly"):
            await structures.compile(TOKENIZER, for_hours())
        await structures.compile(TOKENIZER, schema(type="object"))
        assert [process._running for process in structures._all] == begun, "what is known is known"

    asyncio.run(run())


def test_a_structure_that_breaks_the_process_is_refused_and_the_next_one_is_compiled():
    made = Structures(limit_s=3600)

    async def run():
        await made.compile(TOKENIZER, schema(type="null"))
        task = asyncio.create_task(made.compile(TOKENIZER, for_hours()))
        while made._processes.qsize() == PROCESSES:
            await asyncio.sleep(0.01)
        next(p._running for p in made._all if p._running).kill()
        with pytest.raises(ValueError, match=r"ended the process that tried \(-9\)"):
            await task
        await made.compile(TOKENIZER, schema(type="boolean"))

    try:
        asyncio.run(run())
    finally:
        made.close()


def test_more_than_may_wait_are_told_to_come_again(structures):
    async def run():
        structures._compile = lambda *_: stop.wait()
        made = [schema(const=i) for i in range(MOST_WAITING)]
        waiting = [asyncio.create_task(structures.compile(TOKENIZER, each)) for each in made]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="too many new structures wait") as refused:
            await structures.compile(TOKENIZER, schema(type="null"))
        assert refused.value.status == 429
        stop.set()
        await asyncio.gather(*waiting)

    stop = threading.Event()
    asyncio.run(run())


def test_a_server_ends_at_once_while_one_is_compiled():
    body = {"prompt": "a", "response_format": {"type": "json_schema"}}
    body["response_format"]["json_schema"] = {"schema": {"type": "integer", "multipleOf": 999983}}
    with ThreadPoolExecutor(1) as other:
        with running(structure_timeout_s=3600, drain_s=0) as server:
            known = server.service.structures
            asked = other.submit(_post, server, body)
            wait_until(lambda: any(process._running for process in known._all))
            known.close()
        assert asked.result().status_code == 503
    assert all(process._running is None for process in known._all)


def _post(server, body):
    with server.client() as client:
        return client.post("/v1/completions", json=body)


def test_the_field_that_asks_for_a_structure_is_named_in_its_error():
    with running(make_engine) as server, server.client() as client:
        found = client.post(
            "/v1/completions", json={"prompt": "a", "structured_outputs": {"regex": "("}}
        )
        assert found.status_code == 400
        assert found.json()["error"]["param"] == "structured_outputs"
        recursive = {"prompt": "a", "structured_outputs": {"json": {"$ref": "#"}}}
        assert client.post("/v1/completions", json=recursive).status_code == 400
