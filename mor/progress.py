"""The one progress bar: how far, how long still, and a line of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from mor.accessories import accessory


class ProgressBar:
    """A bar that stays in view on a terminal. Elsewhere it shows nothing, and callers print a line
    with :meth:`note` now and then.

    total: None if it is unknown. counted: show ``done/total`` instead of a percentage.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        *,
        total: float | None,
        done: float = 0,
        counted: bool = False,
    ) -> None:
        self.console, self.label = console, label
        share = MofNCompleteColumn() if counted else TaskProgressColumn()
        # Only the label gives way on a narrow terminal; the rest fits into 58 columns.
        narrow = Column(no_wrap=True, overflow="ellipsis", max_width=max(8, console.width - 58))
        name = TextColumn("{task.description}", table_column=narrow)
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        columns: list[ProgressColumn] = [name, BarColumn(bar_width=20)]
        columns += [] if total is None else [share, *times]
        self._live = _WithText(*columns, console=console, disable=not console.is_terminal)
        self._task = self._live.add_task(label, total=total, completed=done)  # type: ignore[arg-type]

        self._broken: set[str] = set()

    def __enter__(self) -> ProgressBar:
        with showing(self._broken):
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with showing(self._broken):
            self._live.stop()

    @property
    def is_shown(self) -> bool:
        return self.console.is_terminal

    def update(self, done: float, text: str = "", *, label: str | None = None) -> None:
        self._live.text = text
        with showing(self._broken):
            self._live.update(self._task, completed=done, description=label or self.label)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        with showing(self._broken):
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def showing(broken: set[str]) -> Iterator[None]:
    """Around lines that may get lost without ending the work.

    broken: see :func:`mor.accessories.accessory`.
    """
    with accessory("progress is not shown", broken):
        try:
            yield
        except SystemExit:  # rich's answer to a pipe that nobody reads
            raise BrokenPipeError("nobody reads it") from None


class _WithText(Progress):
    """With the text below the bar, so that a long one never pushes the bar out of view."""

    text = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.text:
            yield Text(self.text)
