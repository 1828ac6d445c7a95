"""Where a run's numbers go: metrics.jsonl, and one line of progress for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class MetricsLog:
    """Appends one JSON object per line; ``truncate_to`` drops what a continued run will write again."""

    def __init__(self, path: Path, *, truncate_to: int | None = None) -> None:
        self.path = path
        kept = []
        if truncate_to is not None and path.is_file():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= truncate_to]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class ProgressLine:
    """A live line on a terminal; elsewhere a plain line now and then."""

    def __init__(self, console: Console, total: int, done: int, label: str) -> None:
        self.console, self.label, self.total = console, label, total
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(label, total=total, completed=done, text="")

    def __enter__(self) -> ProgressLine:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def update(self, step: int, text: str) -> None:
        self.bar.update(self.task, completed=step, text=text)

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False)
