"""Ctrl-C and SIGTERM, heard at once also inside one long operation.

Python calls signal handlers between its own instructions only, and a backward pass of a large batch
is a single one. A thread hears the signal meanwhile.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 130  # as shells have it for Ctrl-C
GRACE_S = 2.0
"""How long a second Ctrl-C may stay unheard before the process is ended from the thread."""


@contextmanager
def leaving_at_second(say: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Handlers stay as they are, but a second Ctrl-C ends a process that does not hear it.

    say: as below.
    """
    with _listening(say):
        yield


@contextmanager
def interruptible(say: Callable[[], None]) -> Iterator[list[int]]:
    """A list that Ctrl-C or SIGTERM fills with its number, for whoever looks between two steps.

    say: called from a thread, at once, when the first one comes. The second one raises
    KeyboardInterrupt, or ends the process if that is not heard. A signal that is ignored stays so.
    """
    asked: list[int] = []

    def handle(number: int, _: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield asked  # whoever runs us here handles signals
        return
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        with _listening(say):
            yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started meanwhile ignore Ctrl-C, from their first import on: it is the
    business of whoever started them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _listening(say: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before, over = signal.set_wakeup_fd(writer, warn_on_full_buffer=False), threading.Event()

    def listen() -> None:
        count = 0
        while number := os.read(reader, 1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                count += 1
                if count == 1:
                    say()
                elif not over.wait(GRACE_S):
                    _end()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)


def _end() -> None:
    """Files appear whole or not at all, so nothing half-written is left under its name."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h")  # a progress bar hides the cursor
    os.write(2, b"interrupted\n")
    os._exit(EXIT_CODE)
