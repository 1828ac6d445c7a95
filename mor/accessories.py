"""What may fail without ending the work: lines of progress, logs, trackers; and warnings of it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def accessory(lost: str, broken: set[str]) -> Iterator[None]:
    """Around what may fail without ending the work, such as a line for a reader that is gone.

    lost: what is missing then, for a warning that comes once. broken: who keeps that it came.
    """
    try:
        yield
    except Exception as error:
        if lost not in broken:
            broken.add(lost)
            warnings.warn(f"{lost} ({error}); the work goes on", stacklevel=3)


def plain_warnings() -> None:
    """Show each warning of this process once, in one line, without the place in the code: it may
    come from several places."""
    shown = set[str]()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) in shown:
            return
        shown.add(str(message))
        with suppress(OSError, ValueError):  # the reader is gone
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show
