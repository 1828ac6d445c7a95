"""Small files of settings and results: a crash leaves them whole, and a mistake in one is said with
its name."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a file, only when the new one is complete."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(values, indent=2))
    unfinished.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The table that a file holds. Raises ValueError if it is damaged."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; delete it or take it from a copy") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no table; delete it or take it from a copy")
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """The table that a file holds. Raises ValueError with the place of a mistake."""
    with naming(path):
        return tomllib.loads(path.read_text(encoding="utf-8"))


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Put the name of a file, or of what it holds, before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
