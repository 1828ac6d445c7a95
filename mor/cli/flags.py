"""Help for a command with many flags: the usual ones with their meaning, the others by group."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.table import Table
from tyro.conf import Suppress

from mor.cli.command import Command, description
from mor.cli.show import flag
from mor.settings import Settings


class Flag(NamedTuple):
    name: str  # dotted
    default: Any
    text: str


def flags(settings: Settings, prefix: str = "") -> Iterator[Flag]:
    """Every flag of a command with its default; the string below a field is its text."""
    hints = get_type_hints(type(settings), include_extras=True)
    texts = field_texts(type(settings))
    for f in fields(settings):
        value = getattr(settings, f.name)
        if Suppress in getattr(hints[f.name], "__metadata__", ()):
            continue
        if isinstance(value, Settings):
            marks = getattr(hints[f.name], "__metadata__", ())
            inlined = any(getattr(mark, "name", None) == "" for mark in marks)  # arg(name="")
            yield from flags(value, prefix if inlined else f"{prefix}{f.name}.")
        else:
            parts = [texts.get(f.name, ""), ", ".join(_choices(hints[f.name]))]
            yield Flag(prefix + f.name, value, " ".join(filter(None, parts)))


def _choices(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    return [choice for part in get_args(hint) for choice in _choices(part)]


def field_texts(cls: type) -> dict[str, str]:
    """The string that stands below each field of a class, in one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return {
        before.target.id: " ".join(after.value.value.split())
        for before, after in pairwise(tree.body)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


def print_short_help(command: Command, program: str, usual: Sequence[str]) -> None:
    """usual: dotted names of the flags that are explained, in this order."""
    found = {each.name: each for each in flags(command)}
    console = Console(markup=False, highlight=False)
    console.print(f"usage: {program} [FLAGS]\n\n{description(type(command))}\n")
    explained, others = _grid(), _grid()
    for name in usual:
        default = found[name].default
        shown = "" if default is None or default is False else f"({default})"
        explained.add_row(flag(name), f"{found[name].text} {shown}".strip())
    groups: dict[str, list[str]] = {}
    for name in found:
        if name not in usual:
            groups.setdefault(name.rpartition(".")[0] or "run", []).append(flag(name))
    for group, names in groups.items():
        others.add_row(group, " ".join(names))
    console.print("The usual flags, with their defaults:", explained, "", sep="\n")
    console.print(f"All others; {program} --help-all explains them:", others, sep="\n")


def _grid() -> Table:
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(no_wrap=True)
    made.add_column()
    return made
