"""mor presets"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mor.cli.command import Command
from mor.cli.show import print_json_rows
from mor.settings import PositiveInt, Some


class Presets(Command):
    """The named model shapes: unique parameters and layout with one pass and with more recursions.

    A layout such as 1+10x3+1 is a layer of its own, 10 shared layers that are applied 3 times, and
    another layer of its own.
    """

    recursions: Some[PositiveInt] = (1, 2, 3, 4)
    json: bool = False

    def run(self, console: Console) -> None:
        rows = list(rows_of(self.recursions))
        if self.json:
            print_json_rows(rows)
            return
        title = "Unique parameters and layout by number of recursions"
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("preset", "width", "vocabulary"):
            made.add_column(name, justify="left" if name == "preset" else "right", no_wrap=True)
        for count in self.recursions:
            made.add_column(str(count), justify="right", no_wrap=True)
        for row in rows:
            sizes = (f"{size['params'] / 1e6:,.1f}M\n{size['layout']}" for size in row["sizes"])
            shape = (row[name] for name in ("width", "vocabulary"))
            made.add_row(row["preset"], *(f"{number:,}" for number in shape), *sizes)
        console.print(made)


def rows_of(recursions: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    from mor.costs.flops import unique_params
    from mor.model.config import PRESET_NAMES, preset

    for name in PRESET_NAMES:
        models = [preset(name, num_recursions=count) for count in recursions]
        sizes = [
            {
                "num_recursions": model.num_recursions,
                "layout": model.layout_name,
                "params": unique_params(model),
            }
            for model in models
        ]
        shape = preset(name)
        yield {
            "preset": name,
            "width": shape.dim,
            "heads": shape.num_heads,
            "vocabulary": shape.vocab_size,
            "context": shape.max_seq_len,
            "sizes": sizes,
        }
