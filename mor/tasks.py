"""Tasks of known depth: endless problems from a rule, so that what depth is worth can be measured in minutes.

``data.path="task:assignments?hops=6"`` trains on them. Problem i is a pure function of (seed, i); nothing is
stored, no problem comes twice in an epoch, and the loss counts only on answers.

B problems · T tokens · N nodes or names · Q queries
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from urllib.parse import parse_qsl

import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor

from mor.config import from_dict
from mor.hashing import hash_uniform
from mor.loss import IGNORED
from mor.tokenizer import END_OF_TEXT, Tokenizer

PREFIX = "task:"
NAMES = "abcdefghijklmnopqrstuvwxyz"


class Problems(NamedTuple):
    """hops_BT: look-ups, one after the other, that the answer at a token takes, from 1; 0 where nothing is asked."""

    tokens_BT: Tensor
    targets_BT: Tensor
    hops_BT: Tensor


class Task(Protocol):
    @property
    def hops(self) -> int:
        """The most that an answer takes."""
        ...

    def words(self) -> list[str]:
        """The vocabulary, in the order of token ids; end of text is the first."""
        ...

    def problems(self, index_B: Tensor, length: int) -> Problems:
        """The problems with these numbers, of ``length`` tokens. Raises ValueError if that is too short."""
        ...


@dataclass(frozen=True, kw_only=True)
class PointerChasing:
    """A cycle through all nodes, its edges in random order, then queries with their answers.

    ``c>f a>c f>a +2 a f``: two hops on from a comes f. Every word is one token; the answer f is predicted at a. A query
    needs as many look-ups, one after the other, as it has hops, so depth has something to do, and queries differ in how
    much of it they need.
    """

    nodes: int = 8
    hops: int = 6
    """Queries ask for 1 to this many hops, all equally often."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.nodes <= len(NAMES):
            raise ValueError(f"nodes must lie in 2..{len(NAMES)}, got {self.nodes}")
        if not 1 <= self.hops < self.nodes:
            raise ValueError(f"hops must lie in 1..nodes - 1, so that no query comes round, got {self.hops}")

    def words(self) -> list[str]:
        names = NAMES[: self.nodes]
        edges = [f"{a}>{b}" for a in names for b in names]
        return [END_OF_TEXT, *names, *edges, *(f"+{k}" for k in range(1, self.hops + 1))]

    def problems(self, index_B: Tensor, length: int) -> Problems:
        N, K = self.nodes, self.hops
        Q = (length - N) // 3
        if Q < 1:
            raise ValueError(f"{N} edges and one query take {N + 3} tokens; seq_len={length} is too short")

        def draw(kind: int, count: int) -> Tensor:
            return hash_uniform(self.seed, index_B[:, None], kind, torch.arange(count))

        order_BN = draw(0, N).argsort(1)
        place_BN = order_BN.argsort(1)  # where each node stands in the cycle
        edges_BN = 1 + N + (order_BN * N + order_BN.roll(-1, 1)).gather(1, draw(1, N).argsort(1))
        from_BQ, hops_BQ = (draw(2, Q) * N).long(), 1 + (draw(3, Q) * K).long()
        answer_BQ = 1 + order_BN.gather(1, (place_BN.gather(1, from_BQ) + hops_BQ) % N)
        asked_BQ3 = torch.stack([N + N * N + hops_BQ, 1 + from_BQ, answer_BQ], 2)
        start = torch.zeros(len(index_B), length - N - 3 * Q, dtype=torch.int64)
        tokens_BT = torch.cat([start, edges_BN, asked_BQ3.flatten(1)], 1)
        hops_BT, targets_BT = torch.zeros_like(tokens_BT), torch.full_like(tokens_BT, IGNORED)
        hops_BT[:, length - 3 * Q + 1 :: 3], targets_BT[:, length - 3 * Q + 1 :: 3] = hops_BQ, answer_BQ
        return Problems(tokens_BT, targets_BT, hops_BT)


@dataclass(frozen=True, kw_only=True)
class Assignments:
    """Variables that hold a value or copy an earlier variable; each of them is asked for its value.

    ``a=3 f=7 c<a e<f b<c``: every word is one token, and its target is the value of the variable that it sets, here
    3 7 3 7 3. Values of copies are never shown, so a chain of copies takes one look-up after the other; but all chains
    of a problem can be followed at once, and what one token has found the next can use. Targets are answers, not next
    tokens.
    """

    names: int = 20
    roots: int = 6
    """Variables that hold a value; they come first, and no two hold the same."""
    values: int = 8
    hops: int = 6
    """Longest chain: a value counts 1, a copy of it 2, and so on."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.roots <= min(self.names, self.values) and self.names <= len(NAMES) and self.hops >= 2):
            raise ValueError(
                f"assignments need roots <= names <= {len(NAMES)}, roots <= values and hops >= 2, got "
                f"roots={self.roots}, names={self.names}, values={self.values}, hops={self.hops}"
            )

    def words(self) -> list[str]:
        names, values = NAMES[: self.names], [str(v) for v in range(self.values)]
        return [
            END_OF_TEXT,
            *values,
            *(f"{a}={v}" for a in names for v in values),
            *(f"{a}<{b}" for a in names for b in names),
        ]

    def problems(self, index_B: Tensor, length: int) -> Problems:
        N, R, V = self.names, self.roots, self.values
        if length < N:
            raise ValueError(f"{N} assignments take as many tokens; seq_len={length} is too short")

        def draw(kind: int, count: int) -> Tensor:
            return hash_uniform(self.seed, index_B[:, None], kind, torch.arange(count))

        name_BN = draw(0, N).argsort(1)
        hops_BN, value_BN = torch.ones_like(name_BN), torch.zeros_like(name_BN)
        value_BN[:, :R] = draw(1, V).argsort(1)[:, :R]
        word_BN = 1 + V + name_BN * V + value_BN
        draw_BN = draw(2, N).sqrt()  # leans to long chains, which only late variables can have
        for i in range(R, N):  # each copies one that stands before it
            longest_B = hops_BN[:, :i].amax(1).clamp(max=self.hops - 1)
            hops_BN[:, i] = 2 + (draw_BN[:, i] * longest_B).long()
            fits_Bi = hops_BN[:, :i] == hops_BN[:, i : i + 1] - 1
            source_B1 = torch.where(fits_Bi, draw(3 + i, i), -1.0).argmax(1, keepdim=True)
            value_BN[:, i] = value_BN.gather(1, source_B1)[:, 0]
            word_BN[:, i] = 1 + V + N * V + name_BN[:, i] * N + name_BN.gather(1, source_B1)[:, 0]
        tokens_BT = torch.zeros(len(index_B), length, dtype=torch.int64)
        targets_BT, hops_BT = torch.full_like(tokens_BT, IGNORED), torch.zeros_like(tokens_BT)
        tokens_BT[:, -N:], targets_BT[:, -N:], hops_BT[:, -N:] = word_BN, 1 + value_BN, hops_BN
        return Problems(tokens_BT, targets_BT, hops_BT)


TASKS: dict[str, Callable[..., Task]] = {"pointer-chasing": PointerChasing, "assignments": Assignments}


def parse_task(path: str) -> Task:
    """The task that ``task:NAME?setting=value&...`` names. Raises ValueError for an unknown one."""
    name, _, settings = path.removeprefix(PREFIX).partition("?")
    if name not in TASKS:
        raise ValueError(f"{path!r}: no task {name!r}; there is {', '.join(TASKS)}")
    try:
        values = {key: int(value) for key, value in parse_qsl(settings, strict_parsing=bool(settings))}
    except ValueError:
        raise ValueError(f"{path!r}: settings look like ?hops=6&seed=1, with whole numbers") from None
    return from_dict(TASKS[name], values)  # type: ignore[arg-type]


def task_tokenizer(words: Sequence[str]) -> Tokenizer:
    """One token per word; words stand between blanks."""
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=END_OF_TEXT))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)
