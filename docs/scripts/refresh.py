"""Make the tables of the pages anew: settings from the code, studies from their result files.

    python docs/scripts/refresh.py

A page says what belongs between two comments, and the tables stand there as ordinary Markdown, so
that they can be read without building the site. A test fails when they are out of date.
"""

from __future__ import annotations

import re
from pathlib import Path

import layer_table
import settings_tables
import study_tables

DOCS = Path(__file__).parents[1]
MARKED = re.compile(
    r"(<!-- (settings|presets|study|depths|claims|layers)(?:: ([^\n]*?))? -->\n).*?(<!-- end -->)",
    re.DOTALL,
)
MAKERS = {
    "settings": settings_tables.table,
    "presets": settings_tables.preset_table,
    "study": study_tables.section,
    "depths": study_tables.depths,
    "claims": study_tables.claims,
    "layers": layer_table.layer_table,
}


def refreshed(page: str) -> str:
    """A page with the tables of today."""

    def fill(found: re.Match[str]) -> str:
        start, kind, arguments, end = found.groups()
        return f"{start}\n{MAKERS[kind](*(arguments or '').split())}\n\n{end}"

    return MARKED.sub(fill, page)


def main() -> None:
    for path in sorted(DOCS.rglob("*.md")):
        before = path.read_text(encoding="utf-8")
        if (after := refreshed(before)) != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.relative_to(DOCS)}: tables made anew")


if __name__ == "__main__":
    main()
