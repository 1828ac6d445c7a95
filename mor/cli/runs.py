"""mor runs"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from mor.cli.command import Command
from mor.cli.show import print_json_rows
from mor.run_folder import RunFolder


class Runs(Command):
    """List the runs below a folder: what they are, how far they got, what they scored."""

    folder: Positional[Path] = Path("runs")
    json: bool = False

    def run(self, console: Console) -> None:
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder")
        rows = list(rows_of(self.folder))
        if self.json:
            print_json_rows(rows)
        elif not rows:
            print(f"{self.folder} holds no runs")
        else:
            made, left_out = _fitting(rows, console)
            console.print(made)
            if left_out:
                console.print(f"for want of room without {', '.join(left_out)}: see --json")
            for row in rows:
                if reason := row["problem"] or row["failed"]:
                    console.print(
                        f"{row['run']}: {reason}", soft_wrap=True, markup=False, highlight=False
                    )


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """One row for each run below, by name; a run that cannot be read says why in ``problem``, one
    of a study that failed in ``failed``."""
    from mor.cli.describe import facts
    from mor.studies.study import ERROR

    failed = {file.parent: file for file in folder.rglob(ERROR)}
    for run in sorted({found.path for found in RunFolder.below(folder)} | set(failed)):
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"run": str(run.relative_to(folder))}
        if run in failed:
            row["failed"] = next(iter(failed[run].read_text().splitlines()), "unknown")
        if run in failed and not RunFolder(run).settings.is_file():  # before its first step
            yield row
            continue
        try:
            found = facts(run)
        except ValueError as error:
            yield row | {"problem": str(error)}
            continue
        yield row | {
            "family": found.model.family,
            "layout": found.model.layout_name,
            "step": found.progress.get("step", 0),
            "total_steps": found.total_steps,
            "tokens": found.progress.get("tokens", 0),
            "last_nll": found.last.get("validation_nll"),
            "best_nll": found.best.get("validation_nll"),
            "finished": found.finished,
        }


COLUMNS = (
    "run",
    "family",
    "layout",
    "step",
    "total_steps",
    "tokens",
    "last_nll",
    "best_nll",
    "finished",
    "failed",
    "problem",
)


# From the last one on, what gives way on a narrow terminal, so that names stay whole.
_GIVES_WAY = ("family", "layout", "tokens", "best NLL")


def _fitting(rows: list[dict[str, Any]], console: Console) -> tuple[Table, list[str]]:
    """The widest table that fits, and the columns that it lacks. Only where none does are names
    folded."""
    for kept in range(len(_GIVES_WAY), -1, -1):
        left_out = list(_GIVES_WAY[kept:])
        made = _table(rows, left_out)
        anywhere = console.options.update(max_width=10_000)
        if Measurement.get(console, anywhere, made).maximum <= console.width:
            break
    return made, left_out


def _table(rows: list[dict[str, Any]], left_out: list[str]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    cells = [_cells(row) for row in rows]
    for name in (name for name in cells[0] if name not in left_out):
        words = name in ("run", "family", "layout", "state")
        made.add_column(
            name,
            justify="left" if words else "right",
            no_wrap=name != "run",
            min_width=12 if name == "run" else None,
            overflow="fold" if name == "run" else "ellipsis",
        )
    for row in cells:
        made.add_row(*(Text(value) for name, value in row.items() if name not in left_out))
    return made


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table, by the heads of its columns."""
    losses = {name: row[name.replace(" ", "_").lower()] for name in ("last NLL", "best NLL")}
    known = row["total_steps"] is not None
    return {
        "run": row["run"],
        "family": row["family"] or "",
        "layout": row["layout"] or "",
        "steps": f"{row['step']:,}/{row['total_steps']:,}" if known else "",
        "tokens": _count(row["tokens"]) if known else "",
        **{name: "" if nll is None else f"{nll:.4f}" for name, nll in losses.items()},
        "state": _state(row),
    }


def _state(row: dict[str, Any]) -> str:
    if row["problem"]:
        return "unreadable"
    if row["failed"]:
        return "failed"
    return "finished" if row["finished"] else "unfinished"


def _count(number: float) -> str:
    """In three digits and a unit that fits: 1.02k, 5.30M."""
    number = float(f"{number:.3g}")
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:g}"
