"""Where a run's numbers go: metrics.jsonl, and one line of progress for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mor.training.trackers import NoTracker, Tracker, flat_scalars


class MetricsLog:
    """Appends one JSON object per line; ``truncate_to`` drops what a continued run will write
    again."""

    def __init__(
        self,
        path: Path,
        *,
        truncate_to: int | None = None,
        active: bool = True,
        tracker: Tracker | None = None,
    ) -> None:
        """active: False writes nothing, for all ranks but the first. tracker: gets the numbers as
        well."""
        self.path, self.active, self.tracker = path, active, tracker or NoTracker()
        if not active:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = read_metrics(path) if truncate_to is not None and path.is_file() else []
        unfinished = path.with_name(f".{path.name}.tmp")
        unfinished.write_text(
            "".join(json.dumps(row) + "\n" for row in kept if row["step"] <= (truncate_to or 0))
        )
        unfinished.replace(path)

    def write(self, *, step: int, **values: Any) -> None:
        """NaN and infinity, which JSON has not, become null."""
        if not self.active:
            return
        finite = {
            n: None if isinstance(v, float) and not math.isfinite(v) else v
            for n, v in values.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | finite) + "\n")
        self.tracker.scalars(step, flat_scalars(values))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut off by a crash is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def health_text(health: Mapping[str, Any]) -> str:
    """Router health in a few words for the progress line."""
    if "depth_entropy" not in health:
        return f"depth {health['mean_depth']:.2f}"
    share = "/".join(f"{100 * s:.0f}" for s in health["share_per_recursion"])
    words = [
        f"depth {health['mean_depth']:.2f} ({share}%)",
        f"entropy {health['depth_entropy']:.2f}",
    ]
    words.append(f"dead {100 * health['dead_positions']:.0f}%")
    if health.get("agreement") is not None:
        words.append(f"agreement {100 * health['agreement']:.1f}%")
    if "max_violation" in health:
        words.append(f"MaxVio {health['max_violation']:.2f}")
    return " · ".join(words)


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
        self.console.print(text, highlight=False, soft_wrap=True)
