"""Small JSON files that a crash leaves whole, and whose damage is said with their name."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
