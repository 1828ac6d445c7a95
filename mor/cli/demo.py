"""mor demo"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from mor.cli.command import Command
from mor.settings import PositiveFloat, Seed


class Demo(Command):
    """Train small models at equal FLOPs on text and on a task that needs depth; compare them, draw
    pictures, show how deep each token went. About ten minutes on two cores."""

    out: Path | None = None
    """An empty folder. Default: the first free of runs/demo, runs/demo-2, ..."""
    text_flops: PositiveFloat = 3e12
    """Training FLOPs of each of the four models on text."""
    task_flops: PositiveFloat = 1.6e12
    """Training FLOPs of each of the three models on the task."""
    quick: bool = False
    """Budgets divided by 800 and less validation data: only shows that everything works."""
    seed: Seed = 0
    json: bool = False
    """Print everything as JSON in the last line."""

    def run(self, console: Console) -> None:
        from mor.demo.demo import run_demo

        results = run_demo(
            self.out,
            text_flops=self.text_flops,
            task_flops=self.task_flops,
            quick=self.quick,
            seed=self.seed,
            console=console,
        )
        if self.json:
            print(json.dumps(results))
