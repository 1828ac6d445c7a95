"""Classes of tokens by text, by position and by frequency."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise

from mor.data.problems import Task
from mor.data.tokenizer import Tokenizer
from mor.statistics import GroupMean, group_means

BLOCK = 32  # consecutive tokens that the intervals of a single text take as one observation
LEAST = 20  # tokens of a class that has an interval
KINDS = (
    "word start",
    "word continuation",
    "digit",
    "punctuation",
    "space",
    "part of a character",
    "special",
)


def kinds(
    tokenizer: Tokenizer, ids: Sequence[int], pieces: Sequence[str], task: Task | None = None
) -> list[str]:
    """One of KINDS per token; for a task, what each word is for. pieces: their texts, as
    ``Tokenizer.pieces`` gives them."""
    special = {
        i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special
    }
    found, before = [], ""
    for token_id, piece in zip(ids, pieces, strict=True):
        if token_id in special:
            found.append("special")
        else:
            found.append(task.kind(piece.strip()) if task else _kind(piece, before))
        before = piece or before
    return found


def _kind(piece: str, before: str) -> str:
    body = piece.lstrip()
    if not body:
        return "space" if piece else "part of a character"
    if body[0].isdigit():
        return "digit"
    if unicodedata.category(body[0])[0] not in "LM":
        return "punctuation"
    inside = len(body) == len(piece) and before[-1:].isalpha()
    return "word continuation" if inside else "word start"


def place_groups(positions: Sequence[int], parts: int = 4) -> list[str]:
    """Quarters of the context: "0–127" and so on, of positions in the window."""
    length = max(positions, default=0) + 1
    edges = [i * length // parts for i in range(parts + 1)]
    spans = [(a, b) for a, b in pairwise(edges) if b > a]
    return [next(f"{a}–{b - 1}" for a, b in spans if a <= p < b) for p in positions]


def frequency_groups(counts: Sequence[int]) -> list[str]:
    """Thirds of the tokens, rare to frequent, named by their counts; equal counts stay together."""
    ordered = sorted(counts)
    cuts = [ordered[len(ordered) // 3], ordered[2 * len(ordered) // 3]] if ordered else [0, 0]
    part = [sum(count > cut for cut in cuts) for count in counts]
    spans = {
        p: (min(members), max(members)) for p in set(part) if (members := _where(counts, part, p))
    }
    names = ("rare", "middle", "frequent")
    labels = {
        p: f"{names[p]} ({a:,})" if a == b else f"{names[p]} ({a:,}–{b:,})"
        for p, (a, b) in spans.items()
    }
    return [labels[p] for p in part]


def _where(values: Sequence[int], part: Sequence[int], wanted: int) -> list[int]:
    return [v for v, p in zip(values, part, strict=True) if p == wanted]


def depth_by_class(
    depths: Sequence[float],
    *,
    kind: Sequence[str],
    position: Sequence[int],
    count: Sequence[int],
    blocks: Sequence[int],
) -> dict[str, list[GroupMean]]:
    """Mean depth by kind, by position and by frequency, with 95% intervals over ``blocks`` for
    classes of ``LEAST`` tokens or more."""
    by: dict[str, tuple[list[str], Callable[[str], int]]] = {  # groups, and their order
        "kind": (list(kind), _order_of(kind).index),
        "position": (place_groups(position), lambda group: int(group.split("–")[0])),
        "frequency": (
            frequency_groups(count),
            lambda group: ("rare", "middle", "frequent").index(group.split()[0]),
        ),
    }
    return {
        name: sorted(
            group_means(depths, groups, blocks, at_least=LEAST),
            key=lambda found: order(found.group),
        )
        for name, (groups, order) in by.items()
    }


def _order_of(kind: Sequence[str]) -> list[str]:
    """Kinds of text in the order of KINDS, before those of a task in alphabetical order."""
    return [*KINDS, *sorted(set(kind) - set(KINDS))]
