"""What an answer looks like in JSON: whole, and as events of a stream."""

from __future__ import annotations

import json
import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mor.engine import Request, RequestOutput
from mor.server.engine_thread import FAILED, Answer
from mor.server.errors import ApiError
from mor.server.protocol import ChatRequest, Common, CompletionRequest
from mor.server.token_texts import Offsets, TokenTexts

DONE = b"data: [DONE]\n\n"
TopLogprobs = Sequence[tuple[int, float]]


class Piece(NamedTuple):
    """New tokens of one choice, and the text that they give."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[float | None]
    top_logprobs: Sequence[TopLogprobs | None]
    depths: Sequence[int]
    """Recursions behind each token."""
    finish_reason: str | None
    stop_reason: str | int | None


class Choice(NamedTuple):
    """Where a job of the engine belongs. prompt: the text to give back before the answer."""

    number: int
    prompt_text: str | None


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def event(value: Any) -> bytes:
    return f"data: {compact(value)}\n\n".encode()


def new_depths(request: Request) -> list[int]:
    """Recursions behind each new token: those of the token that predicted it."""
    first = len(request.prompt_ids) - 1
    return request.depths[first : first + len(request.token_ids)]


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def usage(requests: Sequence[Request], prompts: int, *, unwritten: int = 0) -> dict[str, Any]:
    """Tokens read and written, and how deep. prompts: how many of the requests, evenly spaced, are
    counted as prompts; the others are further choices of the same. unwritten: new tokens of each
    that nobody asked for."""
    read = requests[:: max(1, len(requests) // prompts)]
    read_tokens = sum(len(request.prompt_ids) for request in read)
    written = sum(max(0, len(request.token_ids) - unwritten) for request in requests)
    behind = [depth for request in requests for depth in new_depths(request)]
    before = [d for request in read for d in request.depths[: len(request.prompt_ids)]]
    return {
        "prompt_tokens": read_tokens,
        "completion_tokens": written,
        "total_tokens": read_tokens + written,
        "prompt_tokens_details": {
            "cached_tokens": sum(request.num_cached for request in read),
            "mean_depth": mean(before),
        },
        "completion_tokens_details": {"mean_depth": mean(behind)},
    }


class Form(ABC):
    """How one HTTP request wants its choices.

    choices: of each job of the engine. prompts: how many prompts they continue. nothing_new: the
    client wants no new token, though the engine makes one.
    """

    name: str
    chunk_name: str
    prefix: str

    def __init__(
        self,
        request: Common,
        model_name: str,
        texts: TokenTexts,
        choices: Sequence[Choice],
        *,
        prompts: int,
        nothing_new: bool,
    ) -> None:
        self.request, self.texts, self.choices = request, texts, choices
        self.prompts, self.nothing_new = prompts, nothing_new
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created, self.model_name = int(time.time()), model_name
        options = request.stream_options
        self._ends_with_usage = bool(options and options.include_usage)
        self._always_usage = bool(options and options.continuous_usage_stats)
        self._offsets: dict[int, Offsets] = {}

    # Whole.

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        """The body of an answer that is complete."""
        return {
            "id": self.id,
            "object": self.name,
            "created": self.created,
            "model": self.model_name,
            "choices": [
                self._whole(choice, request)
                for choice, request in zip(self.choices, requests, strict=True)
            ],
            "usage": self._usage(requests),
        }

    def _whole(self, choice: Choice, request: Request) -> dict[str, Any]:
        piece = self._shown(_of_request(request))
        made = {"index": choice.number, **self.content(choice, piece, request)}
        made |= self._common(piece)
        return made | {"mean_depth": mean(new_depths(request))}

    def _common(self, piece: Piece) -> dict[str, Any]:
        made: dict[str, Any] = {"finish_reason": piece.finish_reason}
        if piece.finish_reason is not None:
            made["stop_reason"] = piece.stop_reason
        if self.request.return_token_ids:
            made["token_ids"] = list(piece.token_ids)
        if self.request.return_depths:
            made["depths"] = list(piece.depths)
        return made

    def _shown(self, piece: Piece) -> Piece:
        """Without the token that nobody asked for."""
        if not self.nothing_new:
            return piece
        return Piece("", [], [], [], [], piece.finish_reason and "length", None)

    def _usage(self, requests: Sequence[Request]) -> dict[str, Any]:
        return usage(requests, self.prompts, unwritten=int(self.nothing_new))

    # As events.

    def begin(self) -> list[dict[str, Any]]:
        """Choices of events that come before the first token."""
        return []

    def chunk(self, choices: list[dict[str, Any]], answer: Answer) -> bytes:
        made = {
            "id": self.id,
            "object": self.chunk_name,
            "created": self.created,
            "model": self.model_name,
            "choices": choices,
        }
        if self._always_usage:
            made["usage"] = self._usage(answer.requests)
        elif self._ends_with_usage:
            made["usage"] = None
        return event(made)

    def events(self, answer: Answer, outputs: Iterable[tuple[int, RequestOutput]]) -> list[bytes]:
        """One event for each new token. Raises ApiError if the engine gave a request up."""
        made = []
        for place, output in outputs:
            if output.finish_reason == "error":
                raise ApiError(500, FAILED)
            choice, piece = self.choices[place], self._shown(_of_output(output))
            if choice.prompt_text is not None and len(output.request.token_ids) >= 1:
                made += self._echo(place, output.request, answer)
            new = {"index": choice.number, **self.delta(place, piece), **self._common(piece)}
            if piece.finish_reason is not None:
                new["mean_depth"] = mean(new_depths(output.request))
            made.append(self.chunk([new], answer))
        return made

    def end(self, answer: Answer) -> bytes:
        """The events after the last token."""
        last = b""
        if self._ends_with_usage:
            made = {
                "id": self.id,
                "object": self.chunk_name,
                "created": self.created,
                "model": self.model_name,
                "choices": [],
                "usage": self._usage(answer.requests),
            }
            last = event(made)
        return last + DONE

    def _echo(self, place: int, request: Request, answer: Answer) -> list[bytes]:
        """The prompt, once, before the first token."""
        return []

    @abstractmethod
    def content(self, choice: Choice, piece: Piece, request: Request) -> dict[str, Any]:
        """Text and log-probabilities of a whole choice."""

    @abstractmethod
    def delta(self, place: int, piece: Piece) -> dict[str, Any]:
        """The same of a piece."""


class CompletionForm(Form):
    name = chunk_name = "text_completion"
    prefix = "cmpl"
    request: CompletionRequest

    def whole(self, requests: Sequence[Request]) -> dict[str, Any]:
        made = super().whole(requests)
        if self.request.best_of is not None:
            made["choices"] = self._best(made["choices"], requests)
        return made

    def _best(self, choices: list[dict[str, Any]], requests: Sequence[Request]) -> list[Any]:
        """Of each prompt's choices the n with the highest log-probability per token."""
        each, n, kept = self.request.best_of or 1, self.request.n or 1, []
        score = [mean(request.logprobs) or -math.inf for request in requests]
        for start in range(0, len(choices), each):
            order = sorted(range(start, start + each), key=lambda i: -score[i])
            kept += [choices[i] for i in order[:n]]
        return [choice | {"index": index} for index, choice in enumerate(kept)]

    def content(self, choice: Choice, piece: Piece, request: Request) -> dict[str, Any]:
        if choice.prompt_text is not None:
            piece = _joined(self._of_prompt(request)._replace(text=choice.prompt_text), piece)
        return {"text": piece.text, "logprobs": self._logprobs(piece, Offsets(self.texts))}

    def delta(self, place: int, piece: Piece) -> dict[str, Any]:
        offsets = self._offsets.setdefault(place, Offsets(self.texts))
        return {"text": piece.text, "logprobs": self._logprobs(piece, offsets)}

    def _of_prompt(self, request: Request) -> Piece:
        if self.request.logprobs is None:
            return _no_piece()
        ids = request.prompt_ids
        tops = request.prompt_top_logprobs or [None] * len(ids)
        return Piece("", ids, request.prompt_logprobs, tops, (), None, None)

    def _echo(self, place: int, request: Request, answer: Answer) -> list[bytes]:
        text = self.choices[place].prompt_text
        if place in self._offsets or text is None:
            return []
        piece = self._of_prompt(request)._replace(text=text)
        new = {"index": self.choices[place].number, **self.delta(place, piece)}
        return [self.chunk([new | {"finish_reason": None}], answer)]

    def _logprobs(self, piece: Piece, offsets: Offsets) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None
        tops = [
            None if logprob is None else self._tops(token_id, logprob, top or ())
            for token_id, logprob, top in zip(
                piece.token_ids, piece.logprobs, piece.top_logprobs, strict=True
            )
        ]
        return {
            "tokens": [self.texts.text_of(i) for i in piece.token_ids],
            "token_logprobs": list(piece.logprobs),
            "top_logprobs": tops,
            "text_offset": offsets.of(piece.token_ids),
        }

    def _tops(self, token_id: int, logprob: float, top: TopLogprobs) -> dict[str, float]:
        """The best ones and the token itself; of two tokens with the same text, the better."""
        found: dict[str, float] = {}
        for other, value in (*top, (token_id, logprob)):
            found.setdefault(self.texts.text_of(other), value)
        return found


class ChatForm(Form):
    name, chunk_name = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"
    request: ChatRequest

    def content(self, choice: Choice, piece: Piece, request: Request) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(piece)}

    def delta(self, place: int, piece: Piece) -> dict[str, Any]:
        return {"delta": {"content": piece.text}, "logprobs": self._logprobs(piece)}

    def begin(self) -> list[dict[str, Any]]:
        said = {"role": "assistant", "content": ""}
        return [
            {"index": choice.number, "delta": said, "logprobs": None, "finish_reason": None}
            for choice in self.choices
        ]

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self.request.top_logprobs is None:
            return None
        content = []
        for token_id, logprob, top in zip(
            piece.token_ids, piece.logprobs, piece.top_logprobs, strict=True
        ):
            best = [self._entry(*pair) for pair in (top or ())[: self.request.top_logprobs]]
            content.append(self._entry(token_id, logprob) | {"top_logprobs": best})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self.texts.text_of(token_id),
            "logprob": logprob,
            "bytes": list(self.texts.bytes_of(token_id)),
        }


def _no_piece() -> Piece:
    return Piece("", (), (), (), (), None, None)


def _joined(first: Piece, second: Piece) -> Piece:
    return second._replace(
        text=first.text + second.text,
        token_ids=[*first.token_ids, *second.token_ids],
        logprobs=[*first.logprobs, *second.logprobs],
        top_logprobs=[*first.top_logprobs, *second.top_logprobs],
    )


def _of_request(request: Request) -> Piece:
    ids = request.token_ids
    return Piece(
        request.text,
        ids,
        request.logprobs or [None] * len(ids),
        request.top_logprobs or [None] * len(ids),
        new_depths(request),
        request.finish_reason,
        request.stop_reason,
    )


def _of_output(output: RequestOutput) -> Piece:
    ids = [] if output.token_id is None else [output.token_id]
    return Piece(
        output.text,
        ids,
        [output.logprob] * len(ids),
        [output.top_logprobs] * len(ids),
        [output.source_depth or 0] * len(ids),
        output.finish_reason,
        output.request.stop_reason if output.finish_reason is not None else None,
    )
