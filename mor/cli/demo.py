"""mor demo"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from mor.cli.command import Command
from mor.settings import PositiveFloat, Seed


class Demo(Command):
    """Train vanilla, recursive, MoR and a control at equal FLOPs on real text; compare; sample."""

    out: Path = Path("runs/demo")
    flops: PositiveFloat = 3e12
    """Training FLOPs of each of the four models."""
    seed: Seed = 0
    json: bool = False
    """Print the table as JSON in the last line."""

    def run(self, console: Console) -> None:
        from mor.studies.demo import run_demo

        rows = run_demo(self.out, flops=self.flops, seed=self.seed, console=console)
        if self.json:
            print(json.dumps([asdict(row) for row in rows]))
