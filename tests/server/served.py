"""A small random model behind a server: in this process, or listening in a thread."""

import asyncio
import functools
import json
import threading
import time
from contextlib import contextmanager

import httpx2

from mor.data.tokenizer import Tokenizer
from mor.engine import Engine, EngineConfig
from mor.server.config import ServerConfig
from mor.server.run import Server
from mor.server.service import Service, serve
from tests.conftest import tiny
from tests.small_llama import chat_tokenizer

NAME = "tiny"
SLOTS = 4


@functools.cache
def parts():
    """A model and its tokenizer, of 256 bytes and three marks."""
    return tiny(vocab_size=259, max_seq_len=128), Tokenizer.from_transformers(chat_tokenizer())


class Held(Engine):
    """An engine whose steps do nothing while it is held; the others are counted."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.may_go = threading.Event()
        self.may_go.set()
        self.steps = 0

    def step(self):
        if not self.may_go.is_set():
            time.sleep(0.001)
            return []
        self.steps += 1
        return super().step()


def make_engine(slots=SLOTS, **settings):
    settings = {"max_num_seqs": slots, "kv_cache_memory": 1 << 21, "page_size": 4} | settings
    return Held(*parts(), EngineConfig(**settings))


def make_service(make=make_engine, **config):
    return Service(lambda: serve(make()), ServerConfig(**{"port": 0} | config), model_name=NAME)


class Running:
    """A server in a thread. ``engine`` is its engine."""

    def __init__(self, service):
        self.service, self.server = service, Server(service)
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        with asyncio.Runner(loop_factory=self.server.config.get_loop_factory()) as runner:
            runner.run(self.server.serve())

    def start(self):
        self.thread.start()
        wait_until(lambda: self.server.started and self.service.thread.state != "loading")
        if self.service.thread.error is not None:
            raise self.service.thread.error
        self.url = self.service.config.url(self.server.port)
        self.engine = self.service.served.engine
        return self

    def stop(self):
        self.engine.may_go.set()
        self.server.should_exit = True
        self.thread.join()

    def client(self, **settings):
        return httpx2.Client(base_url=self.url, timeout=60, trust_env=False, **settings)

    def wait_until_idle(self):
        wait_until(lambda: not self.service.thread.num_unfinished and not self.engine.requests)


@contextmanager
def running(make=make_engine, **config):
    server = Running(make_service(make, **config)).start()
    try:
        yield server
    finally:
        server.stop()


def wait_until(true, *, at_most_s=60):
    end_s = time.monotonic() + at_most_s
    while not true():
        assert time.monotonic() < end_s, "waited too long"
        time.sleep(0.002)


def events(text):
    """What the events of a stream hold; the last is [DONE]."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert found[-1] == "[DONE]"
    return [json.loads(line) for line in found[:-1]]
