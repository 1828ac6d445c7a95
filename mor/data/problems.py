"""Tasks of known depth: endless problems made by a rule, to measure in minutes what depth is worth.

``data.path="task:state-tracking?hops=16"`` trains on them. Problem i is a pure function of (seed,
i); nothing is stored, no problem comes twice in an epoch, and the loss counts only on answers.

B problems · T tokens · N nodes · Q queries · P moves · S states
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple, Protocol, TypeVar
from urllib.parse import parse_qsl

import tokenizers
import torch
from pydantic import Field
from tokenizers import models, pre_tokenizers
from torch import Tensor

from mor.data.tokenizer import END_OF_TEXT, Tokenizer
from mor.files import naming
from mor.model.loss import IGNORED
from mor.model.random import hash_uniform
from mor.settings import PositiveInt, Seed, Settings, suggestion

Named = TypeVar("Named", bound=Settings)
PREFIX = "task:"
NAMES = "abcdefghijklmnopqrstuvwxyz"


class Problems(NamedTuple):
    """tokens_BT, targets_BT: int64; IGNORED where there is nothing to answer. hops_BT: look-ups,
    one after the other, that the answer takes, from 1; 0 where there is nothing to answer."""

    tokens_BT: Tensor
    targets_BT: Tensor
    hops_BT: Tensor


class Task(Protocol):
    @property
    def hops(self) -> int:
        """The most hops that an answer takes."""
        ...

    def words(self) -> list[str]:
        """The vocabulary, in the order of token ids; end of text is the first."""
        ...

    def kind(self, word: str) -> str:
        """What a word of a text is for."""
        ...

    def problems(self, index: Tensor, length: int) -> Problems:
        """The problems of these numbers, ``length`` tokens each. Raises ValueError if too short."""
        ...

    def answers(self, ids: Sequence[int]) -> list[int]:
        """The right target at each token of any text of the task; IGNORED where nothing is asked or
        the text does not say enough."""
        ...


class PointerChasing(Settings):
    """A cycle through all nodes, its edges in random order, then queries with their answers.

    ``c>f a>c f>a +2 a f``: two hops on from a comes f. Every word is one token; the answer f is
    predicted at a. A query needs as many look-ups, one after the other, as it has hops: depth
    helps, and queries differ in how much of it they need.
    """

    nodes: Annotated[int, Field(ge=2, le=len(NAMES))] = 8
    hops: PositiveInt = 6
    """Queries ask for 1 to this many hops, all equally often."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.hops >= self.nodes:
            raise ValueError(
                f"hops must be less than nodes={self.nodes}, so that no query comes round, "
                f"got {self.hops}"
            )

    def words(self) -> list[str]:
        names = NAMES[: self.nodes]
        edges = [f"{a}>{b}" for a in names for b in names]
        return [END_OF_TEXT, *names, *edges, *(f"+{k}" for k in range(1, self.hops + 1))]

    def kind(self, word: str) -> str:
        return "edge" if ">" in word else "number of hops" if word.startswith("+") else "node"

    def problems(self, index: Tensor, length: int) -> Problems:
        N, K = self.nodes, self.hops
        Q = (length - N) // 3
        if Q < 1:
            raise ValueError(
                f"{N} edges and one query take {N + 3} tokens; seq_len={length} is too short"
            )

        def draw(kind: int, count: int) -> Tensor:
            return hash_uniform(self.seed, index[:, None], kind, torch.arange(count))

        order_BN = draw(0, N).argsort(1)
        place_BN = order_BN.argsort(1)  # where each node stands in the cycle
        edges_BN = 1 + N + (order_BN * N + order_BN.roll(-1, 1)).gather(1, draw(1, N).argsort(1))
        from_BQ, hops_BQ = (draw(2, Q) * N).long(), 1 + (draw(3, Q) * K).long()
        answer_BQ = 1 + order_BN.gather(1, (place_BN.gather(1, from_BQ) + hops_BQ) % N)
        asked_BQ3 = torch.stack([N + N * N + hops_BQ, 1 + from_BQ, answer_BQ], 2)
        start = torch.zeros(len(index), length - N - 3 * Q, dtype=torch.int64)
        tokens_BT = torch.cat([start, edges_BN, asked_BQ3.flatten(1)], 1)
        hops_BT, targets_BT = torch.zeros_like(tokens_BT), torch.full_like(tokens_BT, IGNORED)
        hops_BT[:, length - 3 * Q + 1 :: 3], targets_BT[:, length - 3 * Q + 1 :: 3] = (
            hops_BQ,
            answer_BQ,
        )
        return Problems(tokens_BT, targets_BT, hops_BT)

    def answers(self, ids: Sequence[int]) -> list[int]:
        N, found, hops = self.nodes, [], 0
        after: dict[int | None, int] = {}
        for i in ids:
            node: int | None = i - 1 if hops and i <= N else None
            for _ in range(hops):
                node = after.get(node)
            found.append(IGNORED if node is None else 1 + node)
            if N < i <= N + N * N:
                after[(i - 1 - N) // N] = (i - 1 - N) % N
            hops = max(0, i - N - N * N)
        return found


class StateTracking(Settings):
    """A state that is set and then moved again and again; at every word the target is the state
    after it.

    ``=3 p0 p2 =1 p2`` with fixed permutations p0, p1, ...: the states in between are never shown,
    so how far a word is from the last ``=`` says how many compositions its answer takes. Halves can
    be composed first, so depth L reaches about 2 ** L words. Targets are answers, not next tokens.
    """

    states: Annotated[int, Field(ge=2)] = 5
    moves: PositiveInt = 4
    hops: PositiveInt = 16
    """Most words in a run, counted from the one that sets the state; all lengths equally often."""
    seed: Seed = 0

    def words(self) -> list[str]:
        states = range(self.states)
        moves = (f"p{i}" for i in range(self.moves))
        return [END_OF_TEXT, *map(str, states), *(f"={s}" for s in states), *moves]

    def kind(self, word: str) -> str:
        return {"=": "sets the state", "p": "moves the state"}.get(word[:1], "state")

    def permutations(self) -> Tensor:
        """State after each move from each state, (moves, states); the same for all seeds."""
        return hash_uniform(
            0, torch.arange(self.moves)[:, None], torch.arange(self.states)
        ).argsort(1)

    def problems(self, index: Tensor, length: int) -> Problems:
        def draw(kind: int, below: int) -> Tensor:
            return (
                hash_uniform(self.seed, index[:, None], kind, torch.arange(length)) * below
            ).long()

        set_to_BT, move_BT = draw(0, self.states), draw(1, self.moves)
        run_BT = 1 + draw(2, self.hops)
        after_PS = self.permutations()
        tokens_BT, targets_BT, hops_BT = (torch.empty_like(move_BT) for _ in range(3))
        left, state, hops = (torch.zeros(len(index), dtype=torch.int64) for _ in range(3))
        for t in range(length):
            begins = left == 0
            state = torch.where(begins, set_to_BT[:, t], after_PS[move_BT[:, t], state])
            hops = torch.where(begins, 1, hops + 1)
            left = torch.where(begins, run_BT[:, t], left) - 1
            word = torch.where(begins, set_to_BT[:, t], self.states + move_BT[:, t])
            tokens_BT[:, t], targets_BT[:, t], hops_BT[:, t] = (
                1 + self.states + word,
                1 + state,
                hops,
            )
        return Problems(tokens_BT, targets_BT, hops_BT)

    def answers(self, ids: Sequence[int]) -> list[int]:
        after_PS, found = self.permutations().tolist(), []
        state: int | None = None
        for i in ids:
            word = i - 1 - self.states
            if word < self.states:
                state = word if word >= 0 else None
            elif state is not None:
                state = after_PS[word - self.states][state]
            found.append(IGNORED if state is None else 1 + state)
        return found


TASKS: dict[str, type[PointerChasing] | type[StateTracking]] = {
    "pointer-chasing": PointerChasing,
    "state-tracking": StateTracking,
}


def parse_task(path: str) -> Task:
    """The task that ``task:NAME?setting=value&...`` names. Raises ValueError for an unknown one."""
    return settings_of_task(path, PREFIX, TASKS)


def settings_of_task(path: str, prefix: str, tasks: Mapping[str, type[Named]]) -> Named:
    """The task among these that ``path`` names, with the settings that it gives."""
    name, _, settings = path.removeprefix(prefix).partition("?")
    if name not in tasks:
        raise ValueError(
            f"{path!r}: no task {name!r}{suggestion(name, tasks)}; choose from {', '.join(tasks)}"
        )
    try:
        pairs = parse_qsl(settings, strict_parsing=bool(settings))
        values = {key: int(value) for key, value in pairs}
    except ValueError:
        raise ValueError(
            f"{path!r}: settings look like ?hops=6&seed=1, with whole numbers"
        ) from None
    keys = [key for key, _ in pairs]
    if twice := [key for key in values if keys.count(key) > 1]:
        raise ValueError(f"{path!r}: {twice[0]} is given twice; which of them is meant?")
    with naming(repr(path)):
        return tasks[name].from_dict(values)


def task_tokenizer(words: Sequence[str]) -> Tokenizer:
    """One token per word; words are separated by white space."""
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=END_OF_TEXT)
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)
