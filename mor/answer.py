"""What a request has written so far, as far as it decides what may come next and where it ends.

The plain decoder and every strategy of the engine keep one for each request, so all of them end at
the same token with the same text.

V vocab
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from mor.data.text_stream import TextStream
from mor.data.tokenizer import Tokenizer
from mor.structure import Grammars, grammars

if TYPE_CHECKING:
    from mor.generation import SamplingParams

Reason = Literal["stop", "length"]


class Answer:
    """token_ids: the new tokens, a stop token included. finish_reason: None until it is complete.
    stop_reason: the stop string or token that ended it; None if its length did, or its structure
    without an end token. counts: how often each new token has come, and seen: tokens of prompt and
    answer, both kept only if a penalty asks for them.

    tokenizer: for ``text``, which stays empty without one. Raises ValueError for settings that need
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
        self._pieces = list[str]()
        self.grammars: Grammars | None = None
        if params.structure is not None and tokenizer is not None:
            self.grammars = grammars(tokenizer)
            self.matcher = self.grammars.matcher(params.structure)
        self._counted = bool(params.frequency_penalty or params.presence_penalty)
        self._repeated = params.repetition_penalty != 1
        self.counts = Counter[int]()
        self.seen = dict.fromkeys(prompt_ids) if self._repeated else {}

    @property
    def text(self) -> str:
        """What may be shown by now, without what ended it."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def may_end(self) -> bool:
        return len(self.token_ids) >= self.params.min_new_tokens

    @property
    def changes_logits(self) -> bool:
        """Whether the next token is drawn from other logits than the model's."""
        return bool(
            self.params.logit_bias
            or self._counted
            or self._repeated
            or self.grammars is not None
            or not self.may_end
        )

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """Tokens that would end it too early."""
        ends = () if self.grammars is None else self.grammars.end_ids
        return () if self.may_end else (*self.params.stop_token_ids, *ends)

    def settle(self, allowed_V: np.ndarray) -> None:
        """Complete what the grammar allows, in place: where the answer may end, any stop token may
        end it; where it may not end yet it goes on, unless nothing can follow."""
        assert self.grammars is not None
        if allowed_V[list(self.grammars.end_ids)].any():
            allowed_V[list(self.params.stop_token_ids)] = True
        going_on_V = allowed_V.copy()
        going_on_V[list(self.banned_ids)] = False
        if going_on_V.any():
            allowed_V[:] = going_on_V

    def take(self, token_id: int) -> str:
        """Add a token; the text that may be shown now, all of the rest if it was the last."""
        self.token_ids.append(token_id)
        if self._counted:
            self.counts[token_id] += 1
        if self._repeated:
            self.seen[token_id] = None
        is_end = self.grammars is not None and token_id in self.grammars.end_ids
        if is_end or token_id in self.params.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token_id
            return self.end()
        return self._show(token_id)

    def _show(self, token_id: int) -> str:
        new = ""
        if self._stream is not None:
            new = self._stream.feed([token_id], may_stop=self.may_end)
            self._pieces.append(new)
            self.stop_reason = self._stream.stopped
        if self.grammars is not None:
            self.matcher.consume_token(token_id)
        if self.stop_reason is not None or (
            self.grammars is not None and self.matcher.is_stopped() and not self.matcher.is_error()
        ):
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.params.max_new_tokens:
            self.finish_reason = "length"
        return new if self.finish_reason is None else new + self.end()

    def end(self) -> str:
        """The text that was held back, when nothing more comes."""
        rest = "" if self._stream is None else self._stream.end()
        self._pieces.append(rest)
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
    for answer, allowed_V in zip(answers, allowed_MV, strict=True):
        answer.settle(allowed_V)
    return allowed_MV
