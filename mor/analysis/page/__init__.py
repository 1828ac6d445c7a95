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

import mor.page
from mor.analysis.explain import Explanation

DIGITS = 4
SCRIPTS = ("base.js", "text.js", "drawings.js", "detail.js", "start.js")


def render(explanations: Sequence[Explanation]) -> str:
    """HTML of one model, or of two side by side. Raises ValueError if the two did not read the same
    characters, or if they are judged by different things."""
    if not 1 <= len(explanations) <= 2:
        raise ValueError(f"a page shows one model or two, got {len(explanations)}")
    texts = ["".join(t.piece for t in e.tokens) for e in explanations]
    if texts[-1] != texts[0]:
        raise ValueError(
            "the two tokenizers turn the text into different characters, so it cannot be aligned"
        )
    if _judged_by(explanations[-1]) != _judged_by(explanations[0]):
        raise ValueError(
            "one model is judged by the answers of a task and the other by something else, which "
            "cannot be compared; compare runs on the same task, or runs on text"
        )
    found = [e.to_dict() for e in explanations]
    # The summary is rounded by the page alone, so that the terminal shows the same numbers.
    data = {"models": [rounded(model) | {"summary": model["summary"]} for model in found]}
    plain = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    own = files(__name__)
    return Template((own / "explain.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(" and ".join(e.name for e in explanations)),
        style=mor.page.read(mor.page.STYLE) + (own / "explain.css").read_text(encoding="utf-8"),
        script="\n".join(
            [
                *map(mor.page.read, mor.page.SCRIPTS),
                *((own / name).read_text(encoding="utf-8") for name in SCRIPTS),
            ]
        ),
        data=plain,
    )


def _judged_by(explanation: Explanation) -> list[str | None] | None:
    """The answers; None for next tokens, which are the text itself however it is cut."""
    return None if explanation.asked == "next token" else [t.target for t in explanation.tokens]


def rounded(value: Any) -> Any:
    """Plain values with ``DIGITS`` decimals."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value
