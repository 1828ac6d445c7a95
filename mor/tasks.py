"""Tasks of known depth: endless problems from a rule, so that what depth is worth can be measured in minutes.

``data.path="task:pointer-chasing?nodes=8&hops=6"`` trains on them. Problem i is a pure function of (seed, split, i);
nothing is stored, no problem is seen twice, and the loss counts only on answers.

B problems · T tokens · N nodes · Q queries
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl

import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor

from mor.config import from_dict
from mor.hashing import hash_uniform
from mor.tokenizer import END_OF_TEXT, Tokenizer

PREFIX = "task:"
NAMES = "abcdefghijklmnopqrstuvwxyz"


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
        """The vocabulary, in the order of token ids: end of text, nodes, edges, hops."""
        names = NAMES[: self.nodes]
        edges = [f"{a}>{b}" for a in names for b in names]
        return [END_OF_TEXT, *names, *edges, *(f"+{k}" for k in range(1, self.hops + 1))]

    def problems(self, index_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Token ids (B, length) of the problems with these numbers, and how many hops off the answer is that follows a
        token; 0 where none follows.

        Raises ValueError if ``length`` leaves no room for a query.
        """
        N, K = self.nodes, self.hops
        Q = (length - 1 - N) // 3
        if Q < 1:
            raise ValueError(f"{N} edges and one query take {N + 4} tokens; seq_len={length - 1} is too short")

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
        hops_BT = torch.zeros_like(tokens_BT)
        hops_BT[:, length - 3 * Q + 1 :: 3] = hops_BQ
        return tokens_BT, hops_BT


TASKS: dict[str, type[PointerChasing]] = {"pointer-chasing": PointerChasing}


def parse_task(path: str) -> PointerChasing:
    """The task that ``task:NAME?setting=value&...`` names. Raises ValueError for an unknown one."""
    name, _, settings = path.removeprefix(PREFIX).partition("?")
    if name not in TASKS:
        raise ValueError(f"{path!r}: no task {name!r}; there is {', '.join(TASKS)}")
    try:
        values = {key: int(value) for key, value in parse_qsl(settings, strict_parsing=bool(settings))}
    except ValueError:
        raise ValueError(f"{path!r}: settings look like ?nodes=8&hops=6, with whole numbers") from None
    return from_dict(TASKS[name], values)


def task_tokenizer(words: Sequence[str]) -> Tokenizer:
    """One token per word; words stand between blanks."""
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=END_OF_TEXT))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)
