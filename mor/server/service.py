"""From what a client sent to jobs of the engine, and to the form of the answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from mor.chat import Chat
from mor.data.tokenizer import Tokenizer
from mor.engine import Engine, SamplingParams
from mor.model.budget import Depth, table_of
from mor.server.choices import ChatForm, Choice, CompletionForm, Form
from mor.server.config import ServerConfig
from mor.server.engine_thread import EngineThread, Job
from mor.server.errors import ApiError
from mor.server.metrics import Metrics
from mor.server.protocol import (
    SHARES,
    ChatRequest,
    Common,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    TokenizeRequest,
)
from mor.server.structures import Structures
from mor.server.token_texts import TokenTexts
from mor.structure import Structure

DEFAULT_LENGTH = 16
"""New tokens of a completion that names no number, as OpenAI has it."""
LONG_TEXT = 20_000
"""Characters from which on a text is worked on outside the event loop."""
SEEDS = 2**63
T = TypeVar("T")


class Served(NamedTuple):
    """What is served. no_chat: why there is no chat template."""

    engine: Engine
    tokenizer: Tokenizer
    texts: TokenTexts
    chat: Chat | None
    no_chat: str = ""


def serve(engine: Engine, chat_template: str | None = None) -> Served:
    """What a server needs beside the engine, whose tokenizer it takes. Raises ValueError if there
    is none, and for a template that does not work."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError("a server needs an engine with a tokenizer")
    texts = TokenTexts(tokenizer)
    try:
        return Served(engine, tokenizer, texts, Chat(tokenizer, template=chat_template))
    except (ValueError, ImportError) as error:
        if chat_template is not None:
            raise
        missing = isinstance(error, ImportError)
        said = str(error) if missing else "this model has no chat template"
        return Served(engine, tokenizer, texts, None, f"{said}; use /v1/completions")


class Service:
    """Turns requests into jobs. ``make`` builds what is served, in the engine's thread."""

    def __init__(
        self, make: Callable[[], Served], config: ServerConfig, *, model_name: str
    ) -> None:
        self.config, self.model_name = config, model_name
        self._make, self._created = make, int(time.time())
        self._served: Served | None = None
        self.metrics = Metrics(model_name)
        self.structures = Structures(limit_s=config.structure_timeout_s)
        self.thread = EngineThread(
            self._make_engine,
            self.metrics,
            max_waiting=config.max_waiting,
            max_unread=config.max_unread,
        )

    def _make_engine(self) -> Engine:
        self._served = self._make()
        return self._served.engine

    @property
    def served(self) -> Served:
        """Raises ApiError 503 while there is nothing."""
        self.thread.check_open()
        assert self._served is not None
        return self._served

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here; /v1/models lists what there is",
                param="model",
                code="model_not_found",
            )

    async def completion(self, body: CompletionRequest) -> tuple[list[Job], Form]:
        """Jobs and form of a completion. Raises ApiError 400 for what cannot be honoured."""
        served = self.served
        self._check(body)
        prompts, each = body.prompts, body.best_of or body.n or 1
        self._check_choices(len(prompts) * each)
        jobs, choices = list[Job](), list[Choice]()
        settings = await self._settings(body, served.tokenizer.end_ids)
        settings["prompt_logprobs"] = bool(body.echo) and body.logprobs is not None
        if (body.best_of or 1) > (body.n or 1):
            settings["logprobs"] = True
        for prompt in prompts:
            ids = await self._ids(prompt)
            length = self._length(len(ids), body, DEFAULT_LENGTH)
            self._check_ids("prompt", ids)
            shown = None
            if body.echo:
                shown = prompt if isinstance(prompt, str) else served.tokenizer.decode(ids)
            for number in range(each):
                jobs.append(Job(ids, _params(settings, length, number)))
                choices.append(Choice(len(choices), shown))
        return jobs, self._form(CompletionForm, body, choices, len(prompts))

    async def chat(self, body: ChatRequest) -> tuple[list[Job], Form]:
        """Jobs and form of an answer to a conversation. Raises ApiError as above."""
        served = self.served
        self._check(body)
        each = body.n or 1
        self._check_choices(each)
        chat = self._chat()
        text = await self._conversation(body.messages)
        self._check_fits(text, "messages")
        ids = await self._encode(text, "messages")
        settings = await self._settings(body, chat.stop_token_ids)
        length = self._length(len(ids), body, served.engine.max_len)
        jobs = [Job(ids, _params(settings, length, number)) for number in range(each)]
        choices = [Choice(number, None) for number in range(each)]
        return jobs, self._form(ChatForm, body, choices, 1)

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        served = self.served
        self.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if body.messages is not None:
            ids = await self._encode(await self._conversation(body.messages), "messages")
        else:
            marked = body.add_special_tokens is not False
            ids = await self._encode(body.prompt or "", "prompt", marked=marked)
        found = {"count": len(ids), "max_model_len": served.engine.max_len, "tokens": ids}
        texts = None
        if body.return_token_strs:
            texts = await _outside(len(ids), lambda: [served.texts.text_of(i) for i in ids])
        return found | {"token_strs": texts}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        served = self.served
        self.check_model(body.model)
        text = await _outside(len(body.tokens), lambda: served.tokenizer.decode(body.tokens))
        return {"prompt": text}

    def card(self) -> dict[str, Any]:
        """The model, as /v1/models has it."""
        served, low_high = self.served, self.depth_range()
        return {
            "id": self.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "mor",
            "max_model_len": served.engine.max_len,
            "mor": {
                "num_recursions": served.engine.model.config.num_recursions,
                "has_chat_template": served.chat is not None,
                "depths": low_high and dict(zip(("min", "max"), low_high, strict=True)),
            },
        }

    def stats(self) -> dict[str, Any]:
        """What the engine does now, for pages that show it."""
        self.thread.check_open()
        return {"tokens_per_second": self.thread.tokens_per_second, **self.thread.stats}

    def depth_range(self) -> tuple[float, float] | None:
        """Mean depths that may be asked for; None if there is no choice."""
        try:
            ranges = _reachable(self.served.engine)
        except ValueError:
            return None
        return ranges[0][0], ranges[-1][1]

    def _check(self, body: Common) -> None:
        self.check_model(body.model)
        body.check_supported()

    def _check_choices(self, count: int) -> None:
        if count > self.config.max_choices:
            raise ApiError(
                400,
                f"this asks for {count} choices, one request may have {self.config.max_choices}",
                param="n",
            )

    def _chat(self) -> Chat:
        served = self.served
        if served.chat is None:
            raise ApiError(
                400,
                f"{served.no_chat}, or start the server with --chat-template FILE",
                code="no_chat_template",
            )
        return served.chat

    async def _conversation(self, messages: Sequence[Message]) -> str:
        """A conversation as the template writes it."""
        plain, chat = [message.plain() for message in messages], self._chat()
        try:
            return await _outside(sum(map(_size, plain)), lambda: chat.text(plain))
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None

    async def _ids(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        self._check_fits(prompt, "prompt")
        ids = await self._encode(prompt, "prompt", marked=True)
        return ids or [self.served.tokenizer.end_of_text_id]

    async def _encode(self, text: str, param: str, *, marked: bool = False) -> list[int]:
        tokenizer = self.served.tokenizer
        encode = tokenizer.encode_prompt if marked else tokenizer.encode
        try:
            return await _outside(len(text), lambda: encode(text))
        except ValueError as error:
            raise ApiError(400, str(error), param=param) from None

    def _check_fits(self, text: str, param: str) -> None:
        """Refuse a text that has too many tokens whatever they are, before it is tokenized."""
        served = self.served
        longest, most = served.tokenizer.most_bytes_per_token, served.engine.max_len
        size = len(text.encode(errors="replace"))
        if longest is not None and size > most * longest:
            raise ApiError(
                400,
                f"the model holds {most} tokens, of {longest} bytes at most; the prompt alone has "
                f"{size} bytes",
                param=param,
                code="context_length_exceeded",
            )

    def _check_ids(self, param: str, ids: Iterable[int]) -> None:
        count = self.served.engine.model.config.vocab_size
        if any(token_id >= count for token_id in ids):
            raise ApiError(400, f"{param} has token ids outside 0..{count - 1}", param=param)

    def _length(self, prompt: int, body: Common, default: int) -> int:
        """New tokens to make: at least one, since the engine reads a prompt by making one."""
        if not prompt:
            raise ApiError(400, "a prompt is empty; give at least one token id", param="prompt")
        wanted, most = body.wanted_length(), self.served.engine.max_len
        room = most - prompt
        length = min(default, room) if wanted is None else max(1, wanted)
        if length < 1 or length > room:
            raise ApiError(
                400,
                f"the model holds {most} tokens; the prompt has {prompt}, and {length} more are "
                "asked for"
                if length > 0
                else f"the model holds {most} tokens, the prompt alone has {prompt}",
                param="max_tokens" if wanted is not None else "prompt",
                code="context_length_exceeded",
            )
        if (least := body.min_tokens or 0) > length:
            raise ApiError(
                400,
                f"min_tokens={least} is more than the {length} tokens that are made at most",
                param="min_tokens",
            )
        return length

    async def _settings(self, body: Common, end_ids: Sequence[int]) -> dict[str, Any]:
        """For SamplingParams, without the length."""
        seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed
        ends = () if body.ignore_eos else end_ids
        self._check_ids("stop_token_ids", body.stop_token_ids or ())
        settings = body.sampling() | self._depth(body)
        settings["seed"] = seed
        settings["stop_token_ids"] = tuple(dict.fromkeys((*ends, *(body.stop_token_ids or ()))))
        if (top := body.top_logprobs) is not None:
            settings |= {"logprobs": True, "top_logprobs": top}
        self._check_ids("logit_bias", settings.get("logit_bias", ()))
        if (structure := body.structure()) is not None:
            settings["structure"] = await self._structure(*structure)
        return settings

    async def _structure(self, kind: Any, text: str, param: str) -> Structure:
        """A structure that the engine finds compiled. Raises ApiError 400 if it cannot be
        followed."""
        try:
            made = Structure(kind=kind, text=text)
            await self.structures.compile(self.served.tokenizer, made)
        except (ValueError, ImportError) as error:
            raise ApiError(400, str(error), param=param) from None
        return made

    def _depth(self, body: Common) -> dict[str, Any]:
        """The setting for a wanted depth. Raises ApiError 400 for one that cannot be had."""
        engine, effort = self.served.engine, body.reasoning_effort
        depth: Depth = body.depth
        try:
            if effort is not None:
                depth = depth_at(SHARES[effort], _reachable(engine))
            engine.budget(depth)
        except ValueError as error:
            param = "depth" if effort is None else "reasoning_effort"
            raise ApiError(400, str(error), param=param, code="no_such_depth") from None
        return {} if depth is None else {"depth": depth}

    def _form(
        self, kind: type[Form], body: Common, choices: Sequence[Choice], prompts: int
    ) -> Form:
        return kind(
            body,
            self.model_name,
            self.served.texts,
            choices,
            prompts=prompts,
            nothing_new=body.wanted_length() == 0,
        )


def _reachable(engine: Engine) -> list[tuple[float, float]]:
    """Ranges of mean depths that an engine can give. Raises ValueError if there is no choice."""
    if engine.config.max_depth is not None:
        raise ValueError(f"max_depth={engine.config.max_depth} caps the depths of this server")
    table = table_of(engine.model)
    most = getattr(engine, "deepest", engine.model.config.num_recursions)
    found = []
    for low, high in table.reachable():
        held = [b for b in table.budgets if low <= b <= high and table.recursions(b) <= most]
        if held:
            found.append((held[0], held[-1]))
    return found


def depth_at(share: float, ranges: Sequence[tuple[float, float]]) -> float:
    """The depth at this share of the way from the least to the most, or the nearest that can be
    had."""
    wanted = ranges[0][0] + share * (ranges[-1][1] - ranges[0][0])
    nearest = (min(max(wanted, low), high) for low, high in ranges)
    return min(nearest, key=lambda depth: abs(depth - wanted))


def _size(message: dict[str, str]) -> int:
    return len(message["content"])


async def _outside(characters: int, work: Callable[[], T]) -> T:
    """Long texts are worked on in another thread, so that nobody waits for them."""
    return await asyncio.to_thread(work) if characters > LONG_TEXT else work()


def _params(settings: dict[str, Any], length: int, number: int) -> SamplingParams:
    """Those of a prompt's choice ``number``, which draws with a seed of its own."""
    seed = (settings["seed"] + number + SEEDS) % (2 * SEEDS) - SEEDS
    return _checked(lambda: SamplingParams(**settings | {"max_new_tokens": length, "seed": seed}))


def _checked(make: Callable[[], T]) -> T:
    try:
        return make()
    except ValueError as error:
        raise ApiError(400, str(error)) from None
