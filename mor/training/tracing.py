"""What a few steps of a run did when, on the host and the device: a trace to open in a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule

from mor.accessories import accessory

SKIPPED = 3
"""Steps before: they compile, and ask for memory for the first time."""


@contextmanager
def tracing(steps: int, file: Path, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yields what to call after each step. Once ``steps`` steps were traced, or at the end of the
    run, the trace is written, and ``say`` gets a line with its place.

    steps: 0 traces nothing. A trace that cannot be written is a warning.
    """
    if not steps:
        yield lambda: None
        return
    done = 0

    def write(seen: profile) -> None:
        if done <= SKIPPED:
            return
        with accessory("there is no trace", set()):
            seen.export_chrome_trace(str(file))
            say(f"trace of up to {steps} steps: {file}; open it at ui.perfetto.dev")

    # The step before them starts the profiler, which takes time itself.
    plan = schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=write) as seen:

        def after_step() -> None:
            nonlocal done
            done += 1
            seen.step()

        yield after_step
    if done <= SKIPPED:
        say(f"no trace: it begins after {SKIPPED} steps, and the run ended before")
