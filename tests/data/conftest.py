"""Data are prepared in this process, where a test does not ask for the real workers."""

from concurrent.futures import Future
from pathlib import Path

import pytest

from mor.data import shards
from mor.data.tokenizer import Tokenizer

REAL = shards.ProcessPoolExecutor


class InThisProcess:
    """Does each piece of work when it is given. A worker of its own takes half a second to
    start."""

    def __init__(self, workers, *, mp_context, initializer, initargs):
        assert initializer is shards._start_worker
        self.tokenizer, self.out = Tokenizer.load(initargs[0]), Path(initargs[0])

    def submit(self, work, *arguments):
        shards._tokenizer_of_worker, shards._out_of_worker = self.tokenizer, self.out
        future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **how):
        pass


@pytest.fixture(autouse=True, scope="package")
def no_workers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ProcessPoolExecutor", InThisProcess)
        yield


@pytest.fixture
def real_workers(monkeypatch):
    monkeypatch.setattr(shards, "ProcessPoolExecutor", REAL)
