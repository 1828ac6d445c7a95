"""Which documents are held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

TOLERANCE = 0.2
"""How far a share may be from the one asked for without a word, relative to it."""
_SMALL = 1 / 8


class Divided(NamedTuple):
    """Bytes of text so far, and those of them that are held out."""

    total: int = 0
    held_out: int = 0

    def miss(self, share: float) -> str:
        """What to say if the held-out share is not the one asked for; empty if it is, about."""
        found = self.held_out / max(self.total, 1)
        if abs(found - share) <= TOLERANCE * share:
            return ""
        return (
            f"{found:.2%} of the text is held out for validation, not the {share:.2%} asked for: "
            "documents are not divided, and these are too few or too different in size; change "
            "validation_share or give more documents"
        )


NOTHING = Divided()


def utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def held_out(
    names: Sequence[str], sizes: Sequence[int], share: float, before: Divided = NOTHING
) -> tuple[list[bool], Divided]:
    """Whether each document is held out, and how all text is divided with these.

    sizes: in bytes. before: how the documents before these were divided. As many are held out, in
    the order of a hash of their names, as give the share of all bytes so far; documents too large
    for what is missing are passed over. With two documents or more, each side gets one.
    """
    total = before.total + sum(sizes)
    held, wanted = before.held_out, share * total
    chosen = [False] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda i: draw(names[i]))
    for times in (1, 2):  # first what fits, then what comes nearer by exceeding it
        for i in order:
            # A document that is small against the share may exceed it at any time: to refuse those
            # would hold out short documents only, where a few at a time are divided.
            fits = sizes[i] <= max(times * (wanted - held), _SMALL * wanted)
            if held < wanted and fits and held + sizes[i] < total and not chosen[i]:
                chosen[i] = True
                held += sizes[i]
    if share and not held and total > max(sizes, default=total):
        smallest = min(order, key=lambda i: sizes[i])
        chosen[smallest] = True
        held = sizes[smallest]
    return chosen, Divided(total, held)


def held_out_documents(names: Sequence[str], share: float) -> list[bool]:
    """The same by the number of documents, whatever their size: at least one on each side."""
    order = sorted(names, key=draw)
    count = min(max(sum(draw(name) < share for name in names), 1), len(names) - 1)
    chosen = set(order[:count])
    return [name in chosen for name in names]


def draw(name: str) -> float:
    """A number in [0, 1) that depends only on a document's name."""
    return (
        int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64
    )
