"""What the pages of mor have in common: how they look, and short scripts.

A page written to one file holds them, a page that is served loads them beside its own.
"""

from __future__ import annotations

from importlib.resources import files

STYLE = "look.css"
SCRIPTS = ("elements.js", "tokens.js")  # in the order in which a page needs them


def read(name: str) -> str:
    """Text of one of the files."""
    return (files(__name__) / name).read_text(encoding="utf-8")
