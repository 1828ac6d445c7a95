"""What clients send: OpenAI's fields, those that vLLM and others added, and depth.

Every field may be left out or null. Fields that are not here are ignored, and named in a header of
the answer; those in ``_REFUSED`` would change the answer, so they are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mor.server.errors import ApiError

_BODY = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
Count = Annotated[int, Field(lt=2**31)]
Schema = dict[str, Any] | bool
"""A JSON schema: true takes any JSON, false none."""
MOST_STOPS = 64
MOST_IDS = 1024
"""Of tokens with a bias, and of stop tokens: each choice of a request looks at all of them."""
Words = Annotated[list[str], Field(fail_fast=True)]
Word = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=250)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
SHARES: dict[Effort, float] = {
    "none": 0,
    "minimal": 0,
    "low": 1 / 3,
    "medium": 2 / 3,
    "high": 1,
    "xhigh": 1,
}
"""Of the range of depths that the model was calibrated for."""


class StreamOptions(BaseModel):
    model_config = _BODY

    include_usage: bool | None = None
    """A last event with the numbers of tokens."""
    continuous_usage_stats: bool | None = None
    """The numbers so far in every event."""


class JsonSchema(BaseModel):
    model_config = _BODY

    name: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None


class ResponseFormat(BaseModel):
    model_config = _BODY

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """Exactly one of them."""

    model_config = _BODY

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    """A JSON schema."""
    regex: str | None = None
    choice: Annotated[list[Word], Field(min_length=1)] | None = None
    """One of these texts."""
    grammar: str | None = None
    """In Lark's notation."""
    json_object: bool | None = None


class Common(BaseModel):
    """What both kinds of requests have."""

    model_config = _BODY

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Count, Field(ge=1)] | None = None
    max_tokens: Annotated[Count, Field(ge=0)] | None = None
    min_tokens: Annotated[Count, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**63)] | None = None
    """0 and -1 keep all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Choice i of a prompt draws with seed + i. None: another one for each request."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[Ids, Field(max_length=MOST_IDS)] | None = None
    ignore_eos: bool | None = None
    """Go on after a token that ends a text."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,10}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MOST_IDS),
        ]
        | None
    ) = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None
    depth: Annotated[float, Field(ge=1)] | Literal["full"] | None = None
    """Wanted mean depth of the tokens; full: every trained recursion for each."""
    reasoning_effort: Effort | None = None
    """A share of the depths that the model was calibrated for; ``depth`` says it exactly."""
    return_depths: bool | None = None
    """Give the recursions behind every new token."""

    _REFUSED: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            object.__setattr__(self, "stream_options", None)  # null and unused is the same
        return self

    def check_supported(self) -> None:
        """Raise ApiError for what the server cannot honour."""
        for name in self._REFUSED:
            if (self.model_extra or {}).get(name) not in (None, [], "", False):
                raise ApiError(400, f"{name} is not supported", param=name, code="unsupported")
        if self.depth is not None and self.reasoning_effort is not None:
            raise ApiError(
                400, "depth and reasoning_effort say the same; give one", param="reasoning_effort"
            )

    def ignored(self) -> list[str]:
        """Names of the fields that have no effect, as far as a header can hold them."""
        names = [name for name in self.model_extra or {} if re.fullmatch(r"[\w.-]{1,64}", name)]
        return [name for name in names if name not in self._REFUSED and name.isascii()][:20]

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def wanted_length(self) -> int | None:
        return self.max_tokens

    @property
    def top_logprobs(self) -> int | None:
        """Alternatives to give with each token; None: no log-probabilities at all."""
        raise NotImplementedError

    def structure(self) -> tuple[str, str, str] | None:
        """Kind and text of what the answer must look like, and the field that asks for it. Raises
        ApiError if two things do."""
        named = {
            "response_format": _of_format(self.response_format),
            "structured_outputs": _of_outputs(self.structured_outputs),
        }
        asked = [(*each, name) for name, given in named.items() for each in given]
        if len(asked) > 1:
            raise ApiError(
                400,
                "response_format and structured_outputs may ask for one form only",
                param="structured_outputs",
            )
        return asked[0] if asked else None

    def sampling(self) -> dict[str, Any]:
        """The settings that have the engine's names, as far as they were given."""
        names = (
            *("temperature", "top_p", "min_p"),
            *("frequency_penalty", "presence_penalty", "repetition_penalty"),
        )
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k:
            found["top_k"] = max(0, self.top_k)
        if self.min_tokens:
            found["min_new_tokens"] = self.min_tokens
        if self.logit_bias:
            found["logit_bias"] = {int(key): bias for key, bias in self.logit_bias.items()}
        if self.stops:
            found["stop"] = self.stops
        return found


class CompletionRequest(Common):
    """Continue a text."""

    prompt: Annotated[
        str | Ids | Words | Annotated[list[Ids], Field(fail_fast=True)] | None,
        Field(union_mode="left_to_right"),
    ] = None
    """Text or token ids, or a list of either. Null and empty text begin a new document."""
    best_of: Annotated[Count, Field(ge=1)] | None = None
    """Write this many and give the n likeliest."""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=50)] | None = None
    """How many alternatives to give with their log-probabilities, beside the token itself."""

    _REFUSED = ("suffix", "tools", "functions")

    @property
    def prompts(self) -> list[str | list[int]]:
        given = self.prompt
        if given is None or isinstance(given, str):
            return [given or ""]
        return [given] if given and isinstance(given[0], int) else list(given)  # type: ignore

    def check_supported(self) -> None:
        super().check_supported()
        if self.prompt == []:
            raise ApiError(400, "prompt is an empty list; give text or token ids", param="prompt")
        if self.best_of is not None:
            if self.best_of < (self.n or 1):
                raise ApiError(400, "best_of must be at least n", param="best_of")
            if self.stream and self.best_of > (self.n or 1):
                raise ApiError(
                    400, "best_of cannot be streamed: the best is known last", param="best_of"
                )

    @property
    def top_logprobs(self) -> int | None:
        return self.logprobs


class Part(BaseModel):
    model_config = _BODY

    type: str
    text: str | None = None


class Message(BaseModel):
    model_config = _BODY

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, str]:
        """Role and text. Raises ApiError if it holds anything but text."""
        parts = self.content if isinstance(self.content, list) else []
        for part in parts:
            if part.type != "text" or part.text is None:
                raise ApiError(
                    400,
                    f"the model reads text alone, not parts of type {part.type[:40]!r}",
                    param="messages",
                    code="unsupported",
                )
        text = self.content if isinstance(self.content, str) else ""
        text += "".join(part.text or "" for part in parts)
        # OpenAI's newer name for the same; no template here knows it.
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Common):
    """Answer a conversation."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Count, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs_: Annotated[
        Annotated[int, Field(ge=0, le=50)] | None, Field(alias="top_logprobs")
    ] = None

    _REFUSED = ("functions", "audio")

    def wanted_length(self) -> int | None:
        found = self.max_completion_tokens
        return self.max_tokens if found is None else found

    def check_supported(self) -> None:
        super().check_supported()
        extra = self.model_extra or {}
        if extra.get("tools") and extra.get("tool_choice") != "none":
            raise ApiError(
                400,
                'tools are not supported; leave them out, or send tool_choice: "none"',
                param="tools",
                code="unsupported",
            )
        if extra.get("modalities") not in (None, [], ["text"]):
            raise ApiError(400, "the model writes text alone", param="modalities")
        if self.top_logprobs_ is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")

    @property
    def top_logprobs(self) -> int | None:
        return (self.top_logprobs_ or 0) if self.logprobs else None


class TokenizeRequest(BaseModel):
    """Text, or a conversation."""

    model_config = _BODY

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """False: without the token that begins a text, where the tokenizer has one."""
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    model_config = _BODY

    model: str | None = None
    tokens: Ids


def _of_format(given: ResponseFormat | None) -> list[tuple[str, str]]:
    if given is None or given.type == "text":
        return []
    if given.type == "json_object":
        return [("json_object", "")]
    if given.json_schema is None or given.json_schema.schema_ is None:
        raise ApiError(
            400, "response_format json_schema needs json_schema.schema", param="response_format"
        )
    return [("json_schema", json.dumps(given.json_schema.schema_))]


def _of_outputs(given: StructuredOutputs | None) -> list[tuple[str, str]]:
    if given is None:
        return []
    found = []
    if given.json_ is not None:
        schema = given.json_ if isinstance(given.json_, str) else json.dumps(given.json_)
        found.append(("json_schema", schema))
    if given.regex is not None:
        found.append(("regex", given.regex))
    if given.choice is not None:
        found.append(("regex", _one_of(given.choice)))
    if given.grammar is not None:
        found.append(("lark", given.grammar))
    if given.json_object:
        found.append(("json_object", ""))
    return found


def _one_of(texts: Sequence[str]) -> str:
    """A regular expression of these texts; Python's escapes are more than others know."""
    special = set(r"\.^$|?*+()[]{}/-&~#")
    return "|".join(
        "".join(f"\\{letter}" if letter in special else letter for letter in text) for text in texts
    )


def warning_header(request: Common) -> Mapping[str, str]:
    """A header that names the ignored fields, if there are any."""
    names = request.ignored()
    return {"Warning": f'299 mor "ignored: {", ".join(names)}"'} if names else {}
