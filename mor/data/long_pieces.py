"""Text without white space, cut short for training a BPE."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator

# To a BPE, a run of letters, of digits, of white space or of other characters is one piece, and the
# time that training takes grows with the square of a piece's length.
LONGEST_PIECE = 256
USED_CHARACTERS = 500_000
_LONG_PIECE = re.compile(
    r"[^\W\d_]{N}|\d{N}|\s{N}|(?:[^\w\s]|_){N}".replace("N", str(LONGEST_PIECE))
)
_LONG_SPACE = re.compile(rf"\s{{{LONGEST_PIECE}}}")


def in_short_pieces(documents: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Texts of documents (name, text), cut where a piece would have over 256 characters; of such
    pieces, the first 500,000 characters.

    Warns with the name of a document that was cut, and how many there are.
    """
    cut, left = [], USED_CHARACTERS
    for name, text in documents:
        if not _has_long_piece(text):
            yield text
            continue
        cut.append(name)
        done = 0
        for piece in _LONG_PIECE.finditer(text):
            yield text[done : piece.start()]
            if left > 0:
                yield piece[0]
            left -= LONGEST_PIECE
            done = piece.end()
        yield text[done:]
    if cut:
        unused = f" and left out {-left:,} characters of these" if left < 0 else ""
        warnings.warn(
            f"{len(cut)} document(s), such as {cut[0]}, have stretches of over {LONGEST_PIECE} "
            f"characters without a break; training the BPE cut them into pieces of "
            f"{LONGEST_PIECE}{unused}; how documents are encoded is not affected",
            stacklevel=2,
        )


def _has_long_piece(text: str) -> bool:
    # The pattern is slow, and hardly any text needs it.
    may = max(map(len, text.split()), default=0) >= LONGEST_PIECE or _LONG_SPACE.search(text)
    return bool(may and _LONG_PIECE.search(text))
