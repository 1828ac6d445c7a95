"""The picture on the front page: two texts coloured by the recursions that each token took.

Both runs are those of docs/quickstart.md.

    python docs/scripts/picture.py runs/mor runs/state docs/images/depth.svg
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

import mor
from mor.analysis.explain import Explanation
from mor.data.problems import parse_task
from mor.training.config import load_config

PROSE = (
    "Return the number of items in the list. If the object is not a string or a number, "
    "a TypeError is raised. The default value is None, which means that the file is opened "
    "in binary mode. New in version 3.8."
)
PROBLEM = "=3 p0 p2 p1 p1 p3 p0 p2 p3 p1 p0 =1 p2 p3 p0 =4 p2 p0 p1 p3 p3 p1 p2 =0 p1"
# Of one recursion to four; dark text can be read on each.
SHADES = ("#b7e4c7", "#74c69d", "#f4a261", "#e76f51")
QUIET = "#9aa5b1"


def main(prose_run: str, task_run: str, out: Path) -> None:
    console = Console(record=True, width=88, file=io.StringIO(), force_terminal=True)
    console.print()
    prose = explained(prose_run, PROSE)
    console.print(heading("MoR-3 on text", prose))
    console.print(coloured(prose))
    console.print()
    task = explained(task_run, PROBLEM, task=True)
    console.print(heading("MoR-4 on a task: what is the state now?", task))
    console.print(coloured(task))
    console.print(answers(task))
    console.print(legend())
    svg = console.export_svg(title="recursions per token")
    svg = re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL)  # nothing from the network
    out.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


def explained(run: str, text: str, *, task: bool = False) -> Explanation:
    _, model, tokenizer = mor.load(run)
    config = load_config(Path(run) / "train.json")
    right = parse_task(config.data.path or "").answers(tokenizer.encode(text)) if task else None
    return mor.explain(model, tokenizer, text, window=config.seq_len, answers=right)


def heading(title: str, found: Explanation) -> Text:
    return Text.assemble((title, "bold #e9ecef"), (f"   mean depth {found.mean_depth:.2f}", QUIET))


def coloured(found: Explanation) -> Text:
    text = Text()
    for token in found.tokens:
        space = len(token.piece) - len(token.piece.lstrip(" "))
        text.append(" " * space).append(
            token.piece[space:], f"#14213d on {SHADES[token.depth - 1]}"
        )
    return text


def answers(found: Explanation) -> Text:
    """A tick below every word whose state the model knows, a cross below the others."""
    text = Text()
    for token in found.tokens:
        mark, colour = ("✓", SHADES[0]) if token.rank == 1 else ("✗", SHADES[-1])
        text.append(f"{mark:>{len(token.piece)}}", colour)
    return text


def legend() -> Text:
    text = Text("\nrecursions ", QUIET)
    for depth, shade in enumerate(SHADES, start=1):
        text.append(f" {depth} ", f"#14213d on {shade}").append(" ")
    return text


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
