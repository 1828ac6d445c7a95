"""MkDocs hook: the build fails if a page would load anything from the network."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError

LOADED = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]+)"')


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads {found[1]} from the network")
    return output
