"""Depths as people write them on the command line."""

from __future__ import annotations

from typing import Literal

FULL: Literal["full"] = "full"


def parse_depth(text: str | None, num_recursions: int) -> float | Literal["full"] | None:
    """A number, a share of full depth such as 55%, or full. Raises ValueError for other words."""
    if text is None:
        return None
    if text == FULL:
        return FULL
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100 * num_recursions
        return float(text)
    except ValueError:
        raise ValueError(
            f"--depth takes a mean depth such as 2.2, a share of full depth such as 55%, or full, "
            f"not {text!r}"
        ) from None
