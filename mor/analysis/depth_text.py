"""Text coloured by recursion depth, for terminals; with depth digits where there is no colour."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from mor.data.tokenizer import Tokenizer
from mor.generation import Generation

_COLOURS = ("cyan", "yellow", "red", "magenta", "blue", "green")
_DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹"


def _style(depth: int) -> str:
    """The terminal's own colour for tokens that took no recursion."""
    return _COLOURS[(depth - 1) % len(_COLOURS)] if depth else "default"


def _digits(depth: int) -> str:
    return "".join(_DIGITS[int(d)] for d in str(depth))


def depth_legend(least: int, deepest: int, console: Console) -> Text:
    legend = Text("depth ")
    for depth in range(least, deepest + 1):
        legend.append(
            f" {depth} " if console.color_system else f" {_digits(depth)}", style=_style(depth)
        )
    if not console.color_system:
        legend.append("  (after each token)")
    return legend


def depth_text(tokenizer: Tokenizer, result: Generation, console: Console) -> Text:
    """Prompt and continuation; the last token was never read and has no depth."""
    ids = [*result.prompt_ids, *result.token_ids]
    if ids[-1] in tokenizer.end_ids:
        ids = ids[:-1]
    text = Text()
    for i, piece in enumerate(tokenizer.pieces(ids)):
        depth = result.depths[i] if i < len(result.depths) else None
        bold = " bold" if i < len(result.prompt_ids) else ""
        mark = "" if depth is None or console.color_system else _digits(depth)
        words, line_end = (piece[:-1], "\n") if piece.endswith("\n") else (piece, "")
        style = "dim" if depth is None else _style(depth)
        text.append(words + mark + line_end, style=style + bold)
    return text
