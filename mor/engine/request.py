"""A request and what it yields."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np

from mor.generation import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Phase(Enum):
    """What a running request needs next."""

    READ = "read"  # its prompt, but for the last token
    ENTER = "enter"  # embedding and prelude of its newest token
    BLOCK = "block"  # a pass of the shared block
    CODA = "coda"  # coda, head and sampling


@dataclass(eq=False)
class Request:
    """One prompt and its continuation.

    token_ids: the new tokens, a stop token included. depths: recursions that each prompt token and
    each new one took; the last new token is never read, so it has none. logprobs: log-probability
    of each new token under the model, if ``params.logprobs``. num_read: tokens whose keys and
    values are cached.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    number: int
    """Counts the requests of an engine: lower is older."""
    arrival_s: float = 0.0
    status: Status = Status.WAITING
    phase: Phase = Phase.READ
    token_ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    slot: int = -1
    stage: int = 0
    """Passes that the newest token has behind it."""
    num_read: int = 0
    num_cached: int = 0
    """Prompt tokens taken from the prefix cache."""
    preemptions: int = 0
    taken: list[np.ndarray] = field(default_factory=list)
    """Of the tokens read as prompt: whether they took each recursion, (tokens, R) for each
    chunk."""

    @property
    def known_ids(self) -> list[int]:
        """Prompt and new tokens: what has to be read again after a preemption."""
        return self.prompt_ids + self.token_ids

    @property
    def newest_id(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.prompt_ids[-1]

    @property
    def max_length(self) -> int:
        """Tokens that are cached at most; the last new one is never read."""
        return len(self.prompt_ids) + self.params.max_new_tokens - 1

    @property
    def mean_depth(self) -> float:
        return sum(self.depths) / max(1, len(self.depths))


@dataclass(frozen=True)
class RequestOutput:
    """A new token, or the end of a request without one (``abort``).

    source_depth: recursions of the token that predicted it. logprob: None unless asked for.
    """

    request: Request
    token_id: int | None
    source_depth: int | None
    logprob: float | None
    finish_reason: FinishReason | None
