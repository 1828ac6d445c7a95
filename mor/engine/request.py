"""A request and what it yields."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np

from mor.answer import Answer
from mor.generation import SamplingParams, TopLogprobs
from mor.model.budget import Budget

FinishReason = Literal["stop", "length", "abort", "error"]


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Phase(Enum):
    """What a running request needs next."""

    READ = "read"  # its prompt, except for the last token
    ENTER = "enter"  # embedding and prelude of its newest token
    BLOCK = "block"  # a pass of the shared block
    CODA = "coda"  # coda, head and sampling


@dataclass(eq=False)
class Request:
    """One prompt and its continuation."""

    request_id: str
    answer: Answer
    """What it has written, to which prompt and by which settings."""
    number: int
    """Counts the requests of an engine: lower is older."""
    budget: Budget
    """What decides the depths of its tokens."""
    arrival_s: float = 0.0
    """When it was added, by ``time.monotonic()``."""
    started_s: float | None = None
    """When it got its first slot, by the same clock."""
    status: Status = Status.WAITING
    phase: Phase = Phase.READ
    depths: list[int] = field(default_factory=list)
    """Recursions that each prompt token and each new token took. The last new token is never read,
    so it has none."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each new token under the model, if ``params.logprobs``."""
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    """The likeliest tokens at each new one, as many as ``params.top_logprobs``."""
    prompt_logprobs: list[float | None] = field(default_factory=list)
    """Log-probability of each token of the prompt, if ``params.prompt_logprobs``, as far as it has
    been read. None for the first, which nothing predicts."""
    prompt_top_logprobs: list[TopLogprobs | None] = field(default_factory=list)
    """The likeliest tokens there, if both are asked for."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """What went wrong, if ``finish_reason`` is "error"."""
    slot: int = -1
    """Its place in the cache while it runs."""
    stage: int = 0
    """Passes that the newest token has behind it."""
    num_read: int = 0
    """Tokens whose keys and values are cached."""
    num_cached: int = 0
    """Tokens of the prompt that came from the prefix cache, until the first new token. What is read
    again after a preemption does not count."""
    preemptions: int = 0
    faults: int = 0
    """Steps that failed while it ran."""
    taken: list[np.ndarray] = field(default_factory=list)
    """Whether each prompt token took each recursion: (tokens, recursions) per chunk read."""

    def __post_init__(self) -> None:
        self._forget_prompt()

    def _forget_prompt(self) -> None:
        params = self.params
        self.prompt_logprobs = [None] if params.prompt_logprobs else []
        self.prompt_top_logprobs = [None] if params.prompt_logprobs and params.top_logprobs else []

    @property
    def prompt_ids(self) -> list[int]:
        return self.answer.prompt_ids

    @property
    def params(self) -> SamplingParams:
        return self.answer.params

    @property
    def token_ids(self) -> list[int]:
        """The new tokens, a stop token included."""
        return self.answer.token_ids

    @property
    def text(self) -> str:
        """What it has written, without what ended it, as far as it may be shown; nothing without a
        tokenizer."""
        return self.answer.text

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or token that ended it."""
        return self.answer.stop_reason

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt must be read for its log-probabilities, cached or not."""
        return 0 < len(self.prompt_logprobs) < len(self.prompt_ids)

    @property
    def known_ids(self) -> list[int]:
        """Prompt and new tokens: what has to be read again after a preemption."""
        return self.prompt_ids + self.token_ids

    @property
    def newest_id(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.prompt_ids[-1]

    @property
    def max_length(self) -> int:
        """Most tokens that are cached; the last new one is never read."""
        return len(self.prompt_ids) + self.params.max_new_tokens - 1

    def start_over(self) -> None:
        """Back to waiting, without keys and values: they are computed again."""
        self.status, self.phase, self.slot = Status.WAITING, Phase.READ, -1
        self.num_read, self.depths, self.taken = 0, [], []
        if not self.token_ids:
            self._forget_prompt()

    @property
    def mean_depth(self) -> float:
        """Recursions per token read so far."""
        return sum(self.depths) / max(1, len(self.depths))


@dataclass(frozen=True)
class RequestOutput:
    """A new token, or the end of a request without one (``abort``, ``error``)."""

    request: Request
    token_id: int | None
    source_depth: int | None
    """Recursions of the token that predicted it."""
    logprob: float | None
    """Of the new token under the model; None unless the request asked for it."""
    finish_reason: FinishReason | None
    text: str = ""
    """What may be shown now: characters that are complete, and no beginning of a stop string. The
    last output has the rest."""
    top_logprobs: TopLogprobs | None = None
    """The likeliest tokens at this place, if the request asked for them."""

    @classmethod
    def without_token(cls, request: Request) -> RequestOutput:
        """The end of a request that has ended."""
        return cls(request, None, None, None, request.finish_reason, request.answer.end())
