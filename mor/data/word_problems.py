"""Problems of composition in plain words, for models that read text: each asks for a number of
steps, one after the other, and has one right answer.

``data.path="words:swaps?hops=6&held_out=4"`` trains on 1 to 6 steps and validates on 7 to 10. The
tokenizer is that of the model or of ``data.tokenizer``. Problem i is a pure function of (seed, i);
several stand in a window, and the loss counts only on answers. With ``each=1`` every step is asked
about, and no answer is told.

B problems · T tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, takewhile
from typing import Annotated, NamedTuple

import torch
from pydantic import Field

from mor.data.problems import Problems, settings_of_task
from mor.data.tokenizer import Tokenizer
from mor.model.loss import IGNORED
from mor.model.random import hash_uniform
from mor.settings import NonNegativeInt, PositiveInt, Seed, Settings

WORDS_PREFIX = "words:"
_MOST = 1 << 10  # problems in a window
_DRAWN = 64  # numbers at a time
_PEOPLE = (
    *("Anna", "Ben", "Carl", "Dora", "Emma", "Frank"),
    *("Grace", "Henry", "Iris", "Jack", "Kate", "Leo"),
)


class Step(NamedTuple):
    """text: with the space before it. answer: what is right after it, with the space before it."""

    text: str
    answer: str


class Problem(NamedTuple):
    """opening, then the text of each step, then ending, and then the last step's answer."""

    opening: str
    steps: Sequence[Step]
    ending: str

    @property
    def question(self) -> str:
        return self.opening + "".join(step.text for step in self.steps) + self.ending

    @property
    def answer(self) -> str:
        return self.steps[-1].answer


Draw = Callable[[int], int]
"""A whole number from 0 to below the given one."""


class WordTask(Settings):
    """hops: training asks for 1 to this many steps, all equally often. held_out: validation asks
    for so many more, and no fewer; 0: for the same numbers, in other problems. each: 1 asks after
    every step, without telling the answer, in problems that have all the steps and no ending; 0
    asks at the end."""

    hops: PositiveInt = 6
    held_out: NonNegativeInt = 4
    each: Annotated[int, Field(ge=0, le=1)] = 0
    seed: Seed = 0

    def answers(self) -> list[str]:
        """All that may be right."""
        raise NotImplementedError

    def problem(self, steps: int, draw: Draw) -> Problem:
        raise NotImplementedError

    def _others(self, count: int, items: Sequence[str], draw: Draw) -> list[str]:
        """So many of the items, in a drawn order."""
        left = list(items)
        return [left.pop(draw(len(left))) for _ in range(count)]


class Swaps(WordTask):
    """``The ball is under C. Swaps: AC BD CD. Now the ball is under A``: a state that moves; swaps
    that miss the ball count as steps."""

    cups: Annotated[int, Field(ge=2, le=9)] = 4

    @property
    def _cups(self) -> str:
        return "ABCDEFGHI"[: self.cups]

    def answers(self) -> list[str]:
        return [f" {cup}" for cup in self._cups]

    def problem(self, steps: int, draw: Draw) -> Problem:
        ball = self._cups[draw(self.cups)]
        opening, said = f"The ball is under {ball}. Swaps:", list[Step]()
        for _ in range(steps):
            a, b = sorted(self._others(2, self._cups, draw))
            ball = {a: b, b: a}.get(ball, ball)
            said.append(Step(f" {a}{b}", f" {ball}"))
        return Problem(opening, said, ". Now the ball is under")


class Relay(WordTask):
    """``Ben passes to Carl. Anna passes to Ben. ... Anna starts: pass pass. Now it is with Carl``:
    a ring of people, told in random order."""

    people: Annotated[int, Field(ge=2, le=len(_PEOPLE))] = len(_PEOPLE)

    def __post_init__(self) -> None:
        if self.hops + self.held_out >= self.people:
            raise ValueError(
                f"hops + held_out must be less than people={self.people}, so that no relay comes "
                f"round, got {self.hops} + {self.held_out}"
            )

    def answers(self) -> list[str]:
        return [f" {name}" for name in _PEOPLE[: self.people]]

    def problem(self, steps: int, draw: Draw) -> Problem:
        ring = self._others(self.people, _PEOPLE[: self.people], draw)
        facts = [f"{a} passes to {b}." for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)]
        told = " ".join(self._others(len(facts), facts, draw))
        said = [Step(" pass", f" {ring[step]}") for step in range(1, steps + 1)]
        return Problem(f"{told} {ring[0]} starts:", said, ". Now it is with")


class Arithmetic(WordTask):
    """``Count modulo 10. Start with 3. Add 4. Multiply by 7. The result is 9``."""

    modulus: Annotated[int, Field(ge=2, le=10)] = 10

    def answers(self) -> list[str]:
        return [f" {value}" for value in range(self.modulus)]

    def problem(self, steps: int, draw: Draw) -> Problem:
        value, said = draw(self.modulus), list[Step]()
        opening = f"Count modulo {self.modulus}. Start with {value}."
        for _ in range(steps):
            number = 1 + draw(self.modulus - 1)
            if draw(3) == 0:
                value = value * number % self.modulus
                said.append(Step(f" Multiply by {number}.", f" {value}"))
            else:
                value = (value + number) % self.modulus
                said.append(Step(f" Add {number}.", f" {value}"))
        return Problem(opening, said, " The result is")


WORD_TASKS: dict[str, type[WordTask]] = {"swaps": Swaps, "relay": Relay, "arithmetic": Arithmetic}


def parse_word_task(path: str) -> WordTask:
    """The task that ``words:NAME?setting=value&...`` names. Raises ValueError for an unknown
    one."""
    return settings_of_task(path, WORDS_PREFIX, WORD_TASKS)


def _uniforms(seed: int, index: int) -> Iterator[float]:
    """In [0, 1), as many as are wanted; made together, since one takes as long as many."""
    for first in count(1, _DRAWN):
        yield from hash_uniform(seed, index, torch.arange(first, first + _DRAWN)).tolist()


class Asked(NamedTuple):
    """answers: for each token of one its place, what is to be predicted there, and the steps that
    it takes; 0 where all answers have the same token."""

    ids: list[int]
    answers: list[tuple[int, int, int]]


@dataclass(frozen=True)
class InTokens:
    """A task as a tokenizer reads it. held_out: problems of the numbers of steps that training does
    not see, if there are any."""

    task: WordTask
    tokenizer: Tokenizer
    held_out: bool

    def __repr__(self) -> str:  # of the data's fingerprint, which has the tokenizer by itself
        return f"{self.task!r}, {'held-out' if self.held_out else 'training'} steps"

    @property
    def hops(self) -> int:
        """The most steps that an answer takes."""
        return self.task.hops + self.task.held_out

    def steps(self) -> range:
        """The numbers of steps that are asked for."""
        if self.held_out and self.task.held_out:
            return range(self.task.hops + 1, self.hops + 1)
        return range(1, self.task.hops + 1)

    def problem(self, index: int) -> tuple[Problem, int]:
        """The problem of this number, and its steps."""
        uniform = _uniforms(self.task.seed, index)

        def draw(below: int) -> int:
            return int(next(uniform) * below)

        several = self.steps()
        steps = several[-1] if self.task.each else several[draw(len(several))]
        return self.task.problem(steps, draw), steps

    @cached_property
    def told_apart(self) -> int:
        """The token of an answer, counted from 0, that no other answer has in its place."""
        ids = [self.tokenizer.encode(answer) for answer in self.task.answers()]
        same = (len(set(place)) == 1 for place in zip(*ids, strict=False))
        return len([*takewhile(bool, same)])

    def asked(self, index: int) -> Asked:
        """The problem of this number in tokens."""
        problem, steps = self.problem(index)
        if not self.task.each:
            ids, right = (self.tokenizer.encode(x) for x in (problem.question, problem.answer))
            answers = [(len(ids) - 1 + i, token, 0) for i, token in enumerate(right)]
            place, token, _ = answers[self.told_apart]
            answers[self.told_apart] = (place, token, steps)
            return Asked([*ids, *right], answers)
        ids, answers = self.tokenizer.encode(problem.opening), []
        for number, step in enumerate(problem.steps, start=1):
            ids += self.tokenizer.encode(step.text)
            if number in self.steps():
                right = self.tokenizer.encode(step.answer)
                answers.append((len(ids) - 1, right[self.told_apart], number))
        return Asked(ids, answers)

    def problems(self, index: torch.Tensor, length: int) -> Problems:
        """Windows of ``length`` tokens, each with as many problems as fit and end-of-text after
        each. hops: at the one token of an answer where answers differ. Raises ValueError if none
        fits."""
        tokens_BT = torch.full((len(index), length), self.tokenizer.end_of_text_id)
        targets_BT, hops_BT = torch.full_like(tokens_BT, IGNORED), torch.zeros_like(tokens_BT)
        for row, window in enumerate(index.tolist()):
            start = 0
            for number in range(window * _MOST, (window + 1) * _MOST):
                ids, answers = self.asked(number)
                end = start + len(ids)
                if end > length and not start:
                    steps = max(step for _, _, step in answers)
                    raise ValueError(
                        f"a problem of {steps} steps takes {end} tokens; seq_len={length} is too "
                        "short"
                    )
                if end > length:
                    break
                tokens_BT[row, start:end] = torch.tensor(ids)
                for place, token, step in answers:
                    targets_BT[row, start + place], hops_BT[row, start + place] = token, step
                start = end + 1
        return Problems(tokens_BT, targets_BT, hops_BT)
