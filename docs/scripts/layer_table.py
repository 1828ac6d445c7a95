"""The table of the rooms, made of the contract in pyproject. ``refresh.py`` puts it into a page."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def layer_table() -> str:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    rows = ["| Floor | Room | What is in it |", "| ---: | --- | --- |"]
    for floor, layer in zip(range(len(layers) - 1, -1, -1), layers, strict=True):
        rows += [f"| {floor} | `{room}` | {_about(room)} |" for room in layer.split(" | ")]
    return "\n".join(rows)


def _about(room: str) -> str:
    """The first sentence of a module's docstring."""
    place = ROOT / "mor" / room
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split())
    return text.partition(". ")[0].rstrip(".").replace("|", "&#124;")
