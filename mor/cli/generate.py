"""mor generate"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from tyro.conf import Positional

from mor.cli.command import Command
from mor.cli.depth import parse_depth
from mor.settings import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    UnitInterval,
)


class Generate(Command):
    """Continue a text with a checkpoint, or chat with it."""

    checkpoint: Positional[Path]
    prompt: str | None = None
    """Text to continue. With --chat the question; without one, questions are read line by line."""
    chat: bool = False
    """Put the prompt into the tokenizer's chat template and print the answer alone."""
    system: str | None = None
    """System message for --chat."""
    max_new_tokens: PositiveInt = 100
    temperature: NonNegativeFloat = 0.8
    """0 is greedy."""
    top_k: NonNegativeInt = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: Share = 0.95
    """Keep the likeliest tokens up to this probability."""
    min_p: UnitInterval = 0.0
    """Cut tokens below this share of the likeliest one's probability."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1, tokens that have come before are less likely."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from a token's logit for each time that the answer has it."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted once if the answer has it."""
    logit_bias: dict[NonNegativeInt, Annotated[float, Field(allow_inf_nan=True, lt=math.inf)]] = (
        field(default_factory=dict)
    )
    """Tokens and what is added to their logits: 12 -5 7 2 adds -5 to token 12 and 2 to token 7."""
    seed: Seed = 0
    stop: tuple[str, ...] = ()
    """Texts that end the answer, which is printed up to the first of them."""
    stop_token_ids: tuple[NonNegativeInt, ...] = ()
    """Tokens that end the answer, beside those that end any text."""
    min_new_tokens: NonNegativeInt = 0
    """Nothing ends the answer before so many tokens."""
    json_schema: Path | None = None
    """A file with a JSON schema; the answer is JSON of it (extra serve)."""
    grammar: Path | None = None
    """A file with a grammar for the answer, in llguidance's Lark (extra serve)."""
    regex: str | None = None
    """A regular expression that the whole answer matches (extra serve)."""
    max_depth: PositiveInt | None = None
    """Cap on every token's recursions."""
    depth: str | None = None
    """Mean depth, such as 2.2, 55% (of full depth) or full. Default: the model's own rule."""
    show_depth: bool = False
    """Colour each token by its recursion depth."""
    device: str = "auto"
    """auto, cpu, cuda or another PyTorch device."""
    json: bool = False
    logprobs: bool = False
    """With --json, also the log-probability of each new token."""

    def without_effect(self) -> Iterator[tuple[str, str]]:
        if self.temperature == 0:
            yield "top_k top_p min_p seed", "with --temperature 0, which takes the likeliest token"
        if self.json:
            yield "show_depth", "with --json, which has the depths anyway"
        else:
            yield "logprobs", "without --json, which has a place for them"
        if not self.chat:
            yield "system", "without --chat, whose template has a place for it"

    def run(self, console: Console) -> None:
        from mor.analysis.depth_text import depth_legend, depth_text
        from mor.chat import Chat
        from mor.checkpoint import load
        from mor.device import pick_device
        from mor.generation import generate

        self._check()
        config, model, tokenizer = load(self.checkpoint, device=pick_device(self.device))
        chat = Chat(tokenizer) if self.chat else None
        params = self._params(chat.stop_token_ids if chat else tokenizer.end_ids, model)
        if chat and self.prompt is None:
            self._converse(model, tokenizer, chat, params)
            return
        assert self.prompt is not None
        ids = (
            chat.prompt(self._messages(self.prompt))
            if chat
            else tokenizer.encode_prompt(self.prompt)
        )
        ids = ids or [tokenizer.end_of_text_id]
        if not self.show_depth and not self.json:
            self._print_stream(model, tokenizer, ids, params, lead="" if chat else self.prompt)
            return
        (result,) = generate(model, [ids], params, tokenizer=tokenizer, max_depth=self.max_depth)
        if self.json:
            found = {"prompt": self.prompt, **asdict(result)}
            print(json.dumps(found | {"mean_depth": result.mean_depth}))
            return
        deepest = max([config.num_recursions, *result.depths])
        console.print(depth_legend(config.least_depth, deepest, console))
        console.print(depth_text(tokenizer, result, console), soft_wrap=True)
        console.print(
            f"mean depth {result.mean_depth:.2f}, trained with {config.num_recursions}",
            highlight=False,
        )

    def _check(self) -> None:
        if self.prompt is None and (not self.chat or self.show_depth or self.json):
            raise ValueError(
                "no prompt was given; add --prompt TEXT (only plain --chat reads lines instead)"
            )

    def _params(self, stop_token_ids: tuple[int, ...], model: Any) -> Any:
        from mor.generation import SamplingParams

        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias,
            seed=self.seed,
            stop_token_ids=(*stop_token_ids, *self.stop_token_ids),
            stop=self.stop,
            min_new_tokens=self.min_new_tokens,
            logprobs=self.logprobs,
            structure=self._structure(),
            depth=parse_depth(self.depth, model.config.num_recursions),
        )

    def _structure(self) -> Any:
        """What the answer must look like; None if it may be anything."""
        from mor.structure import Structure

        given = {"json_schema": self.json_schema, "lark": self.grammar, "regex": self.regex}
        wanted = {kind: value for kind, value in given.items() if value is not None}
        if len(wanted) > 1:
            raise ValueError("give one of --json-schema, --grammar and --regex")
        for kind, value in wanted.items():
            text = value.read_text(encoding="utf-8") if isinstance(value, Path) else value
            return Structure.from_dict({"kind": kind, "text": text})
        return None

    def _messages(self, *turns: str) -> list[dict[str, str]]:
        """The system message, then user and assistant in turn."""
        said = [
            {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
        ]
        return ([] if self.system is None else [{"role": "system", "content": self.system}]) + said

    def _print_stream(
        self, model: Any, tokenizer: Any, ids: list[int], params: Any, *, lead: str = ""
    ) -> str:
        """Print ``lead`` once the options have passed their checks, then the new text, which is
        returned."""
        from mor.generation import stream

        shown = ""
        for event in stream(model, [ids], params, tokenizer=tokenizer, max_depth=self.max_depth):
            print(lead + event.text, end="", flush=True)
            shown, lead = shown + event.text, ""
        print()
        return shown

    def _converse(self, model: Any, tokenizer: Any, chat: Any, params: Any) -> None:
        """Answer each line of the standard input, remembering those before."""
        turns: list[str] = []
        if sys.stdin.isatty():
            print("Type a line and press Enter; end with Ctrl-D.")
        for line in sys.stdin:
            if line.strip():
                ids = chat.prompt(self._messages(*turns, line.strip()))
                turns += [line.strip(), self._print_stream(model, tokenizer, ids, params)]
