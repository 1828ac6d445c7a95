"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_json(rows: list[dict[str, Any]]) -> None:
    print(json.dumps(rows[0] if len(rows) == 1 else rows))


def print_json_rows(rows: list[dict[str, Any]]) -> None:
    """A list, also of one row."""
    print(json.dumps(rows))


def print_facts(
    groups: dict[str, dict[str, Any]], as_json: bool, console: Console, *, title: str
) -> None:
    """Groups of named values: JSON in one line, or a list for people."""
    if as_json:
        print(json.dumps({group.replace(" ", "_"): values for group, values in groups.items()}))
        return
    made = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for group, values in groups.items():
        made.add_section()
        made.add_row(f"{group}:", "" if values else "none")
        for name, value in values.items():
            made.add_row(f"  {name.replace('_', ' ')}", "–" if value is None else cell(value))
    console.print(made)


def print_rows(rows: list[dict[str, Any]], as_json: bool, console: Console, *, title: str) -> None:
    """JSON in one line (an object for one row), or a table with a column for each row."""
    if as_json:
        print_json(rows)
        return
    made = Table(title=title, title_justify="left", show_header=False)
    for name in rows[0]:
        made.add_row(name, *(cell(row[name]) for row in rows))
    for column in made.columns[1:]:
        column.justify = "right"
    console.print(made)


def cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(cell, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    digits = 4 if abs(value) < 100 else 1 if abs(value) < 1e4 else 0
    return f"{value:,.{digits}f}".removesuffix(".0")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
