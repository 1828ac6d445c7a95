"""What a request has written so far, as far as it decides what may come next and where it ends.

The plain decoder and every strategy of the engine keep one for each request, so all of them end at
the same token with the same text.

M answers · V vocab
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from mor.data.text_stream import TextStream
from mor.data.tokenizer import Tokenizer
from mor.structure import Grammars, grammars

if TYPE_CHECKING:
    from mor.generation import SamplingParams

Reason = Literal["stop", "length"]


class Changes:
    """What bias and penalties do to the logits of some tokens: to a logit x, ``add`` is added; then
    it is divided by ``factor``, or multiplied if it is negative; then ``less`` is subtracted.

    Kept up to date token by token, so that a long text costs no more than a short one.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        self._params = params
        repeats = params.repetition_penalty != 1
        known = dict.fromkeys([*params.logit_bias, *(prompt_ids if repeats else ())])
        self._place = {token_id: place for place, token_id in enumerate(known)}
        room = len(known) + params.max_new_tokens
        self._ids, self._count = np.zeros((2, room), dtype=np.int64)
        self._ids[: len(known)] = list(known)
        self._of_each = np.tile([0.0, 1.0, 0.0], (room, 1))
        self._of_each[: len(params.logit_bias), 0] = list(params.logit_bias.values())
        if repeats:
            seen = [self._place[token_id] for token_id in prompt_ids]
            self._of_each[seen, 1] = params.repetition_penalty

    def note(self, token_id: int) -> None:
        """Count a new token of the answer."""
        params, place = self._params, self._place.setdefault(token_id, len(self._place))
        self._ids[place] = token_id
        self._count[place] += 1
        less = params.frequency_penalty * int(self._count[place]) + params.presence_penalty
        self._of_each[place, 1:] = params.repetition_penalty, less

    @property
    def now(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and add, factor and less of each."""
        return self._ids[: len(self._place)], self._of_each[: len(self._place)]


class Answer:
    """token_ids: the new tokens, a stop token included. text: what may be shown, but for what ended
    it. finish_reason: None until it is complete. stop_reason: the stop string or token that
    ended it; None if its length did, or its structure without an end token. changes: what bias and
    penalties do to logits; None if there are none.

    tokenizer: for the text, which stays empty without one. Raises ValueError for settings that need
    a tokenizer without one, and for a structure that llguidance refuses.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: list[int], tokenizer: Tokenizer | None = None
    ) -> None:
        self.params, self.prompt_ids, self.token_ids = params, prompt_ids, list[int]()
        self.finish_reason: Reason | None = None
        self.stop_reason: str | int | None = None
        for name, setting in (("stop strings", params.stop), ("a structure", params.structure)):
            if setting and tokenizer is None:
                raise ValueError(f"{name} cannot be followed without a tokenizer; give one")
        self._stream = None if tokenizer is None else TextStream(tokenizer, params.stop)
        self.text = ""
        self.grammars: Grammars | None = None
        if params.structure is not None and tokenizer is not None:
            self.grammars = grammars(tokenizer)
            self.matcher = self.grammars.matcher(params.structure)
        penalties = (params.repetition_penalty - 1, params.frequency_penalty)
        changing = params.logit_bias or any(penalties) or params.presence_penalty
        self.changes = Changes(params, prompt_ids) if changing else None

    @property
    def may_end(self) -> bool:
        return len(self.token_ids) >= self.params.min_new_tokens

    @property
    def changes_logits(self) -> bool:
        """Whether the next token is drawn from other logits than the model's."""
        return self.changes is not None or self.grammars is not None or not self.may_end

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """Tokens that would end it too early."""
        ends = () if self.grammars is None else self.grammars.end_ids
        return () if self.may_end else (*self.params.stop_token_ids, *ends)

    def settle(self, allowed: np.ndarray) -> None:
        """Complete which tokens the grammar allows, in place: where the answer may end, any stop
        token may end it; where it may not end yet it goes on, unless nothing can follow."""
        if self.matcher.is_accepting():
            allowed[list(self.params.stop_token_ids)] = True
        going_on = allowed.copy()
        going_on[list(self.banned_ids)] = False
        if going_on.any():
            allowed[:] = going_on

    def take(self, token_id: int) -> str:
        """Add a token; the text that may be shown now, all of the rest if it was the last."""
        self.token_ids.append(token_id)
        if self.changes is not None:
            self.changes.note(token_id)
        if token_id in self.params.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token_id
            return self.end()
        complete = self._completes(token_id)
        if complete and self.grammars is not None and token_id in self.grammars.end_ids:
            self.finish_reason, self.stop_reason = "stop", token_id
            return self.end()
        new = ""
        if self._stream is not None:
            new = self._stream.feed([token_id], may_stop=self.may_end)
            self.text += new
            self.stop_reason = self._stream.stopped
        if complete or self.stop_reason is not None:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.params.max_new_tokens:
            self.finish_reason = "length"
        return new if self.finish_reason is None else new + self.end()

    def _completes(self, token_id: int) -> bool:
        """Follow the structure with a token; whether nothing can come after it."""
        if self.grammars is None:
            return False
        self.matcher.consume_token(token_id)
        return bool(self.matcher.is_stopped() and not self.matcher.is_error())

    def end(self) -> str:
        """The text that was held back, when nothing more comes."""
        rest = "" if self._stream is None else self._stream.end()
        self.text += rest
        return rest

    def impossible(self) -> str:
        """Why no token may come next, where none may."""
        reason = "logit_bias, min_new_tokens and structure together forbid every token"
        if self.grammars is not None and (error := self.matcher.get_error()):
            reason = f"llguidance gave up on the structure: {error.splitlines()[0]}"
        return f"no token may follow after {len(self.token_ids)} new ones: {reason}"


def allowed_rows(answers: Sequence[Answer], vocab_size: int) -> np.ndarray:
    """Which tokens may come next in each of several answers with a structure and one tokenizer,
    (M, V) of bool."""
    own = answers[0].grammars
    assert own is not None
    allowed_MV = own.allowed([answer.matcher for answer in answers], vocab_size)
    for answer, allowed in zip(answers, allowed_MV, strict=True):
        answer.settle(allowed)
    return allowed_MV
