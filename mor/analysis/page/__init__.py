"""The page that `mor explain` writes: one file with everything in it, readable without a network.

The data in it is :meth:`Explanation.to_dict`, with fewer digits; the scripts draw it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

from mor.analysis.explain import Explanation

DIGITS = 4
SCRIPTS = ("base.js", "text.js", "drawings.js", "detail.js", "start.js")


def render(explanations: Sequence[Explanation]) -> str:
    """HTML of one model, or of two side by side. Raises ValueError if the two did not read the same characters."""
    if not 1 <= len(explanations) <= 2:
        raise ValueError(f"a page shows one model or two, got {len(explanations)}")
    texts = ["".join(t.piece for t in e.tokens) for e in explanations]
    if texts[-1] != texts[0]:
        raise ValueError("the two tokenizers turn the text into different characters, so it cannot be aligned")
    data = {"models": [rounded(e.to_dict()) for e in explanations]}
    plain = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    own = files(__name__)
    return Template((own / "explain.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(" and ".join(e.name for e in explanations)),
        style=(own / "explain.css").read_text(encoding="utf-8"),
        script="\n".join((own / name).read_text(encoding="utf-8") for name in SCRIPTS),
        data=plain,
    )


def rounded(value: Any) -> Any:
    """Plain values with ``DIGITS`` decimals."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value
