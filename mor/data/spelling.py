"""Whether tokens spell the text that they stand for: some tokenizers know only part of it.

Bits per byte divide by the bytes of the tokens, so they are those of the text only where the two
are the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from tokenizers import models

from mor.settings import Listed, NonNegativeInt, Settings, flat

if TYPE_CHECKING:
    from mor.data.tokenizer import Tokenizer

TOLERANCE = 0.001
"""Share of a text in which its tokens may differ from it and still give bits per byte."""
UNREADABLE = 0.9
"""Share of a text without tokens that is no text for this tokenizer at all."""
_WHITE = b" \t\n\r\v\f"
_EXAMPLES, _TRIED = 3, 2000


class Spelling(Settings):
    """How tokens differ from their text, in UTF-8 bytes. text: all but white space. lost: of that,
    what no token spells. changed: white space that is lacking, and what is spelt beyond the text.
    examples: of what is lost."""

    text: NonNegativeInt = 0
    lost: NonNegativeInt = 0
    changed: NonNegativeInt = 0
    examples: Listed[tuple[str, ...]] = ()

    def __add__(self, other: Spelling) -> Spelling:
        return Spelling(
            text=self.text + other.text,
            lost=self.lost + other.lost,
            changed=self.changed + other.changed,
            examples=tuple(dict.fromkeys(self.examples + other.examples))[:_EXAMPLES],
        )

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return dict(flat(asdict(self)))

    @property
    def is_exact(self) -> bool:
        return self.lost + self.changed <= TOLERANCE * self.text

    def remark(self, name: str) -> str:
        """What to say of it; empty if all of the text is there. name: what the text is, in words.
        Raises ValueError if there is next to nothing of it."""
        known = f", such as {', '.join(map(repr, self.examples))}" if self.examples else ""
        if self.lost > UNREADABLE * self.text:
            raise ValueError(
                f"this tokenizer cannot read {name}: it has no tokens for "
                f"{self.lost / self.text:.1%} of it{known}. Give text of the kind it was made for"
            )
        consequence = "" if self.is_exact else "; there are no bits per byte of it"
        if self.lost:
            return (
                f"the tokenizer has no tokens for {100 * self.lost / self.text:.2g}% of {name} (in "
                f"bytes){known}: the loss is that of what is left{consequence}"
            )
        if self.is_exact:
            return ""
        return (
            f"the tokens differ from {name} in {self.changed:,} bytes, such as white "
            f"space{consequence}"
        )


def visible_bytes(text: bytes) -> int:
    """Bytes that are not white space."""
    return len(text.translate(None, _WHITE))


def spelling(tokenizer: Tokenizer, texts: Iterable[str], ids: Iterable[Sequence[int]]) -> Spelling:
    """How the tokens of these documents differ from their texts, or from what the tokenizer's
    normalizer makes of these."""
    found = Spelling()
    for text, document in zip(texts, ids, strict=True):
        one = _spelling(tokenizer, text, document)
        if one.lost and len(found.examples) < _EXAMPLES:
            one += Spelling(examples=tuple(islice(_lost(tokenizer, text), _EXAMPLES)))
        found += one
    return found


def _spelling(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> Spelling:
    """Of one document, without examples: the smallest difference from a form of its text."""
    visible, white = tokenizer.text_bytes.of_document(ids)
    found: list[Spelling] = []
    for form in _forms(tokenizer, text):
        as_bytes = form.encode()
        wanted = visible_bytes(as_bytes)
        beyond = max(visible - wanted, 0) + abs(len(as_bytes) - wanted - white)
        found.append(Spelling(text=wanted, lost=max(wanted - visible, 0), changed=beyond))
        if not found[-1].lost + beyond:
            break
    return min(found, key=lambda each: each.lost + each.changed)


def _forms(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    yield text
    if (normalizer := tokenizer.backend.normalizer) is not None:
        changed = normalizer.normalize_str(text).replace("▁", " ")
        yield changed if text.startswith(" ") else changed.removeprefix(" ")


def _lost(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """Words or characters of a text that the tokenizer has no tokens for."""
    of_words = isinstance(tokenizer.backend.model, models.WordLevel | models.WordPiece)
    pieces = list(islice(dict.fromkeys(text.split() if of_words else text), _TRIED))
    for piece, ids in zip(pieces, tokenizer.encode_documents(pieces), strict=True):
        if _spelling(tokenizer, piece, ids).lost:
            yield piece[:20]


def spells(
    tokenizer: Tokenizer, texts: Iterable[str], ids: Iterable[Sequence[int]], name: str
) -> bool:
    """Whether bytes of these tokens are those of their texts; warns of what is lost. Raises
    ValueError for texts that the tokenizer cannot read."""
    found = spelling(tokenizer, texts, ids)
    if remark := found.remark(name):
        warnings.warn(remark, stacklevel=3)
    return found.is_exact
