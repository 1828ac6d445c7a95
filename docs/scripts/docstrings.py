"""MkDocs hook: how docstrings look on the API page.

They say ``:func:`name```, as editors understand, and the page shows the name. They describe
arguments as ``name: what it is.``, several in a row, and the page gives each a line.
"""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|func|meth|mod):(?=<code>)")
PARAGRAPH = re.compile(r"(?<=<p>).*?(?=</p>)", re.DOTALL)
NAMED = re.compile(r"(^|(?<=[.;:])\s+)([a-z_]\w*(?:, [a-z_]\w*)*): ")


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    if page.file.src_uri != "api.md":
        return html
    return PARAGRAPH.sub(lambda found: arguments(found[0]), ROLE.sub("", html))


def arguments(paragraph: str) -> str:
    def line(found: re.Match[str]) -> str:
        return f"{'<br>' if found[1] else ''}<code>{found[2]}</code>: "

    return re.sub(r"(?<=[.;])\s+(?=Raises )", "<br>", NAMED.sub(line, paragraph))
