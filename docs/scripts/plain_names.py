"""MkDocs hook: docstrings say ``:func:`name```, as editors understand; the pages show the name."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|func|meth|mod):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    return ROLE.sub("", html)
