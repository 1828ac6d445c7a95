"""mor runs"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
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
            console.print(_table(rows))
            for row in rows:
                if row["problem"]:
                    console.print(f"{row['run']}: {row['problem']}", soft_wrap=True)


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """One row for each run below, by name; a run that cannot be read says why in ``problem``."""
    from mor.cli.describe import facts

    for run in (found.path for found in RunFolder.below(folder)):
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"run": str(run.relative_to(folder))}
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
    "problem",
)


def _table(rows: list[dict[str, Any]]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("run", overflow="fold")
    for name in ("family", "layout"):
        made.add_column(name, no_wrap=True)
    for name in ("steps", "tokens", "last NLL", "best NLL"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("state", no_wrap=True)
    for row in rows:
        if row["problem"]:
            made.add_row(row["run"], *[""] * 6, "unreadable")
            continue
        losses = (row["last_nll"], row["best_nll"])
        made.add_row(
            row["run"],
            row["family"],
            row["layout"],
            f"{row['step']:,}/{row['total_steps']:,}",
            f"{row['tokens'] / 1e6:,.2f}M",
            *("" if nll is None else f"{nll:.4f}" for nll in losses),
            "finished" if row["finished"] else "unfinished",
        )
    return made
