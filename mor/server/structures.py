"""Compiles what clients say their answers must look like, with a limit of time.

llguidance cannot be interrupted, and a schema of a few words may take it hours. So another process
tries every new one, and ends itself when it takes too long; what passes is compiled here.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue

import mor
from mor.data.tokenizer import Tokenizer
from mor.server.errors import ApiError
from mor.structure import Structure, grammars

REMEMBERED = 256
"""Structures whose outcome is known, as many as stay compiled."""
PROCESSES = 2
MOST_WAITING = 16


class Structures:
    """Structures of one server. limit_s: how long compiling one may take."""

    def __init__(self, *, limit_s: float) -> None:
        self._limit_s = limit_s
        self._outcomes = OrderedDict[Structure, Future[None]]()
        self._threads = ThreadPoolExecutor(PROCESSES, thread_name_prefix="mor-structure")
        self._processes = LifoQueue[_Process]()  # the one used last comes first
        self._all = [_Process(limit_s) for _ in range(PROCESSES)]
        for process in self._all:
            self._processes.put(process)

    async def compile(self, tokenizer: Tokenizer, structure: Structure) -> None:
        """Returns when the engine finds it compiled. Equal ones are compiled once. Raises
        ValueError, with the reason, for one that cannot be followed or takes too long, ImportError
        without llguidance, and ApiError 429 if too many wait."""
        outcome = self._outcomes.get(structure)
        if outcome is None:
            if sum(not each.done() for each in self._outcomes.values()) >= MOST_WAITING:
                raise ApiError(
                    429,
                    "too many new structures wait to be compiled; try again later",
                    code="overloaded",
                    headers={"Retry-After": str(int(self._limit_s) + 1)},
                )
            outcome = self._threads.submit(self._compile, tokenizer, structure)
            self._outcomes[structure] = outcome
            self._forget_old()
        self._outcomes.move_to_end(structure)
        try:
            await asyncio.shield(asyncio.wrap_future(outcome))
        except ValueError:
            raise
        except Exception:  # the structure is not to blame
            self._outcomes.pop(structure, None)
            raise

    def _forget_old(self) -> None:
        for structure, outcome in list(self._outcomes.items()):
            if len(self._outcomes) <= REMEMBERED:
                return
            if outcome.done():
                del self._outcomes[structure]

    def close(self) -> None:
        """End what is being compiled."""
        self._threads.shutdown(wait=False)
        for process in self._all:
            process.close()

    def _compile(self, tokenizer: Tokenizer, structure: Structure) -> None:
        made = grammars(tokenizer)
        process = self._processes.get()
        try:
            process.check(tokenizer, structure)
        finally:
            self._processes.put(process)
        made.matcher(structure)


class _Process:
    """One that runs structure_process.py; begun when it is needed, and again after it ended."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._is_open = limit_s, True
        self._running: subprocess.Popen[str] | None = None

    def check(self, tokenizer: Tokenizer, structure: Structure) -> None:
        """Raise ValueError for a structure that cannot be followed, or not within the limit."""
        if not self._is_open:
            raise ApiError(503, "the server is shutting down", code="draining")
        running = self._running or self._begin(tokenizer)
        assert running.stdin is not None and running.stdout is not None
        try:
            _write(running, {"kind": structure.kind, "text": structure.text})
            answer = running.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            if (reason := json.loads(answer)) is not None:
                raise ValueError(reason)
            return
        self._gone(running)
        if running.returncode == -signal.SIGALRM:
            raise ValueError(
                f"the structure ({structure.kind}) is too costly: compiling it takes longer than "
                f"{self._limit_s:g} s; make it smaller"
            )
        raise ValueError(
            f"the structure ({structure.kind}) cannot be followed: compiling it ended the process "
            f"that tried ({running.returncode})"
        )

    def _begin(self, tokenizer: Tokenizer) -> subprocess.Popen[str]:
        home = str(Path(mor.__file__).parents[1])
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        running = self._running = subprocess.Popen(
            [sys.executable, "-m", "mor.server.structure_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the server
        )
        if not self._is_open:  # closed meanwhile
            running.kill()
        given = {"tokenizer": tokenizer.backend.to_str(), "end_ids": list(tokenizer.end_ids)}
        assert running.stdout is not None
        try:
            _write(running, given | {"limit_s": self._limit_s})
            is_ready = bool(running.stdout.readline())
        except BrokenPipeError:
            is_ready = False
        if not is_ready:
            self._gone(running)
            raise RuntimeError(f"no process for structures could be begun ({running.returncode})")
        return running

    def _gone(self, running: subprocess.Popen[str]) -> None:
        """Clear up after a process. Raises ApiError 503 if it was closed."""
        self._running = None
        _close(running)
        if not self._is_open:
            raise ApiError(503, "the server is shutting down", code="draining")

    def close(self) -> None:
        self._is_open = False
        if (running := self._running) is not None:
            running.kill()
            running.wait()


def _write(running: subprocess.Popen[str], value: object) -> None:
    assert running.stdin is not None
    running.stdin.write(json.dumps(value) + "\n")
    running.stdin.flush()


def _close(running: subprocess.Popen[str]) -> None:
    running.wait()
    for pipe in (running.stdin, running.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except BrokenPipeError:
            pass
