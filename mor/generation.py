"""Decoding, plainly: prefill, then one token per sequence and step, each as deep as its router
asks.

The reference for every faster decoder. Sequences may have prompts of different lengths; finished
ones cost nothing. What a sequence draws depends on its own seed and position only.

B rows of the batch · T columns · V vocab
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from mor.answer import Answer, allowed_rows
from mor.data.tokenizer import Tokenizer
from mor.files import naming
from mor.model.budget import Budget, Depth, budget_of, router_for
from mor.model.checks import check_finite, check_max_depth
from mor.model.config import ModelConfig
from mor.model.kv_cache import KVCache
from mor.model.random import hash_uniform
from mor.model.routers import Router
from mor.model.transformer import Logits, Output, Transformer
from mor.settings import (
    Listed,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Settings,
    Share,
    UnitInterval,
)
from mor.structure import Structure

TopLogprobs = list[tuple[int, float]]
"""The best tokens with their log-probabilities, best first."""


def _plain(value: Any) -> Any:
    """Numbers of NumPy and of tensors as Python's, alone, in lists and in tables."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {_plain(key): _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


_Plain = BeforeValidator(_plain)
_Strings = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
]
_Penalty = Annotated[float, Field(ge=-2, le=2), _Plain]
# Minus infinity is a bias, the others that are not finite are none.
_Bias = Annotated[float, Field(allow_inf_nan=True, lt=math.inf)]
PositiveDepth = Annotated[float, Field(ge=1)]


class SamplingParams(Settings):
    """How one request samples. Numbers and lists may be NumPy's or tensors.

    A token is drawn in this order: logit_bias, penalties, structure and min_new_tokens,
    temperature, top_k, top_p, min_p. Log-probabilities are of the model, before all of these.
    """

    max_new_tokens: Annotated[PositiveInt, _Plain] = 128
    """Most tokens of the answer, a stop token included."""
    temperature: Annotated[NonNegativeFloat, _Plain] = 1.0
    """0 is greedy."""
    top_k: Annotated[int, Field(ge=0, lt=2**63), _Plain] = 0
    """Keep so many of the likeliest tokens; 0 keeps all."""
    top_p: Annotated[Share, _Plain] = 1.0
    """Keep the fewest likeliest tokens that reach this probability; 1 keeps all."""
    min_p: Annotated[UnitInterval, _Plain] = 0.0
    """Tokens below this share of the likeliest one's probability are cut."""
    seed: Annotated[Seed, _Plain] = 0
    """What is drawn depends on it and the number of the token alone."""
    stop_token_ids: Annotated[Listed[tuple[NonNegativeInt, ...]], _Plain] = ()
    """Tokens that end the answer; its text is without them."""
    stop: Listed[_Strings] = ()
    """The text ends before the first of these strings, wherever tokens begin and end."""
    min_new_tokens: Annotated[NonNegativeInt, _Plain] = 0
    """Neither a stop token nor a stop string ends it before so many tokens."""
    repetition_penalty: Annotated[PositiveFloat, _Plain] = 1.0
    """Positive logits of tokens that have come, in prompt or answer, are divided by it, negative
    ones multiplied."""
    frequency_penalty: _Penalty = 0.0
    """Subtracted from a token's logit for each time that the answer has it."""
    presence_penalty: _Penalty = 0.0
    """Subtracted once if the answer has it."""
    logit_bias: Annotated[dict[NonNegativeInt, _Bias], _Plain] = dataclasses.field(
        default_factory=dict, hash=False
    )
    """Added to the logits of these tokens; minus infinity bans one."""
    structure: Structure | None = None
    """What the answer must look like. It ends when it is complete, stop tokens or not."""
    logprobs: bool = False
    """Also give the log-probability of each new token."""
    top_logprobs: Annotated[NonNegativeInt, _Plain] = 0
    """Also give so many of the likeliest tokens at each new token, with their log-probabilities."""
    prompt_logprobs: bool = False
    """Also give both for the tokens of the prompt, except for the first."""
    depth: Annotated[PositiveDepth | Literal["full"] | None, _Plain] = None
    """Mean depth of the request's tokens, prompt included, from 1 on (model/budget.py). full: every
    trained recursion for every token. None: the model's own rule."""

    def __post_init__(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is more than "
                f"max_new_tokens={self.max_new_tokens}"
            )

    @property
    def log_min_p(self) -> float:
        return math.log(self.min_p) if self.min_p else -math.inf


def sample(
    logits: Tensor, params: SamplingParams, counter: int, answer: Answer | None = None
) -> int:
    """One token from one row of logits; ``counter`` numbers the draws of a request.

    answer: what has been written so far, for settings that look at it. Raises ValueError for logits
    that are not finite, and if no token may come next.
    """
    check_finite(logits)
    if answer is not None and answer.changes_logits:
        logits = adjusted(logits, answer)
        if logits.max() == -math.inf:
            raise ValueError(answer.impossible())
    if params.temperature == 0:
        return int(logits.argmax())
    ordered, ids = logits.sort(descending=True, stable=True)
    if params.top_k:
        ordered, ids = ordered[: params.top_k], ids[: params.top_k]
    # With the largest at 0, the smallest temperature overflows to minus infinity alone.
    scaled = (ordered.double() - ordered[0]) / params.temperature
    probability = scaled.softmax(0)
    below = probability.cumsum(0) - probability
    kept = probability * (below < params.top_p)  # the fewest best tokens that reach top_p
    kept = kept * (scaled >= params.log_min_p)  # a share of probabilities, as a distance of logits
    cumulative = kept.cumsum(0)
    draw = hash_uniform(params.seed, counter).to(cumulative.device) * cumulative[-1]
    place = min(int(torch.searchsorted(cumulative, draw, right=True)), int((kept > 0).sum()) - 1)
    return int(ids[place])


def adjusted(logits: Tensor, answer: Answer) -> Tensor:
    """Logits that the next token of an answer is drawn from: with bias and penalties, and minus
    infinity where a token may not come."""
    params, seen = answer.params, set(answer.prompt_ids + answer.token_ids)
    logits = logits.clone() if logits.dtype == torch.float64 else logits.float().clone()
    for token_id in seen | params.logit_bias.keys():
        value, count = float(logits[token_id]), answer.token_ids.count(token_id)
        value += params.logit_bias.get(token_id, 0.0)
        if token_id in seen:
            penalty = params.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        value -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        logits[token_id] = value
    if answer.grammars is not None:
        allowed = torch.from_numpy(allowed_rows([answer], len(logits))[0])
        logits[~allowed.to(logits.device)] = -math.inf
    elif answer.banned_ids:
        logits[list(answer.banned_ids)] = -math.inf
    return logits


def logprob(logits: Tensor, token_id: int) -> float:
    """Of one token, in nats. Raises ValueError for logits that are not finite."""
    check_finite(logits)
    return float(logits[token_id].double() - logits.double().logsumexp(0))


def top_logprobs(logits: Tensor, count: int) -> TopLogprobs:
    """The ``count`` likeliest tokens; of equal ones the lower id comes first."""
    ids = logits.sort(descending=True, stable=True).indices[:count].tolist()
    return [(token_id, logprob(logits, token_id)) for token_id in ids]


@dataclass(frozen=True)
class TokenEvent:
    """A new token of sequence ``index``. source_depth: recursions of the one that predicted it.
    text: what may be shown now, if there is a tokenizer. logprob, top_logprobs: None unless asked
    for."""

    index: int
    token_id: int
    source_depth: int
    finish_reason: Literal["stop", "length"] | None
    text: str = ""
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None


@dataclass
class Generation:
    """token_ids: the new tokens, a stop token included. depths: recursions that each prompt token
    and each new one took; the last new token was never read, so it has none. text: of the new
    tokens, up to what ended them, if there was a tokenizer. logprobs, top_logprobs: of each new
    token, if asked for. prompt_logprobs, prompt_top_logprobs: of each token of the prompt, if asked
    for; None for the first, which nothing predicts. stop_reason: the stop string or token that
    ended it."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    text: str = ""
    stop_reason: str | int | None = None
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top_logprobs: list[TopLogprobs | None] = field(default_factory=list)

    @property
    def mean_depth(self) -> float:
        return sum(self.depths) / len(self.depths)


def prefill(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    cache: KVCache,
    *,
    max_depth: int | None = None,
    logits: Logits = "last",
    router: Router | None = None,
) -> Output:
    """Read prompts of any length into an empty cache; logits of each last token, (B, 1, V), unless
    others are wanted."""
    device = model.embedding.weight.device
    width = max(map(len, prompts))
    tokens_BT = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=device)
    length_B1 = torch.tensor([[len(p)] for p in prompts], device=device)
    mask_BT = torch.arange(width, device=device) < length_B1
    return model(
        tokens_BT, mask_BT=mask_BT, cache=cache, logits=logits, max_depth=max_depth, router=router
    )


def decode_step(
    model: Transformer,
    token: Sequence[int],
    active: Sequence[bool],
    cache: KVCache,
    *,
    max_depth: int | None = None,
    router: Router | None = None,
) -> Output:
    """Read one token of every active sequence; logits (B, 1, V), zeros where inactive."""
    device = model.embedding.weight.device
    tokens_B1 = torch.tensor(token, device=device)[:, None]
    mask_B1 = torch.tensor(active, device=device)[:, None]
    return model(
        tokens_B1, mask_BT=mask_B1, cache=cache, logits="last", max_depth=max_depth, router=router
    )


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    max_depth: int | None = None,
    depth: Depth = None,
) -> Iterator[TokenEvent]:
    """Every new token as soon as it is known. Arguments and errors as in :func:`generate`."""
    results, answers = _checked(model, prompts, params, tokenizer, max_depth, depth)
    return _decode(model, results, answers, max_depth)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    max_depth: int | None = None,
    depth: Depth = None,
) -> list[Generation]:
    """Continue token prompts, all together.

    prompts: a list of lists (or tensors) of token ids. params: one for all, or one per prompt.
    tokenizer: for the text of what comes out; stop strings and structures need it.
    max_depth caps the recursions of every token. depth: the mean depth of requests whose params
    name none. Raises ValueError, before anything runs, for what :func:`begin` refuses, for a
    max_depth beyond the model and a depth that it cannot have; and for a model whose logits are not
    finite, and where settings forbid every token.
    """
    results, answers = _checked(model, prompts, params, tokenizer, max_depth, depth)
    for _ in _decode(model, results, answers, max_depth):
        pass
    return results


@torch.inference_mode()
def _decode(
    model: Transformer, results: list[Generation], answers: list[Answer], max_depth: int | None
) -> Iterator[TokenEvent]:
    """Fill ``results`` in place, yielding each token."""
    prompts = [result.prompt_ids for result in results]
    for result, answer in zip(results, answers, strict=True):
        if answer.params.prompt_logprobs:
            _score_prompt(model, result, answer.params, max_depth)
    router = router_for(model, [answer.params.depth for answer in answers])
    cache = _cache(model, len(prompts), router)
    output = prefill(model, prompts, cache, max_depth=max_depth, router=router)
    while True:
        depths = output.routing.depths_by_row()
        for i, (result, answer) in enumerate(zip(results, answers, strict=True)):
            if result.finish_reason is None:
                result.depths += depths[i]
                yield _next_token(i, result, answer, output.logits_BTV[i, 0])
        active = [result.finish_reason is None for result in results]
        if not any(active):
            return
        newest = [r.token_ids[-1] for r in results]
        output = decode_step(model, newest, active, cache, max_depth=max_depth, router=router)


def _next_token(index: int, result: Generation, answer: Answer, logits: Tensor) -> TokenEvent:
    """Draw a token and note it."""
    params = answer.params
    token = sample(logits, params, len(answer.token_ids), answer)
    text = answer.take(token)
    value = logprob(logits, token) if params.logprobs else None
    best = top_logprobs(logits, params.top_logprobs) if params.top_logprobs else None
    result.logprobs += [] if value is None else [value]
    result.top_logprobs += [] if best is None else [best]
    result.text, result.finish_reason = answer.text, answer.finish_reason
    result.stop_reason = answer.stop_reason
    return TokenEvent(index, token, result.depths[-1], result.finish_reason, text, value, best)


def _score_prompt(
    model: Transformer, result: Generation, params: SamplingParams, max_depth: int | None
) -> None:
    """Log-probabilities of a prompt's tokens, each under the logits of the one before it."""
    ids = result.prompt_ids
    router = router_for(model, params.depth)
    cache = _cache(model, 1, router)
    output = prefill(model, [ids], cache, max_depth=max_depth, logits="all", router=router)
    logits_TV = output.logits_BTV[0]
    result.prompt_logprobs = [None, *map(logprob, logits_TV, ids[1:])]
    if count := params.top_logprobs:
        result.prompt_top_logprobs = [None, *(top_logprobs(x, count) for x in logits_TV[:-1])]


def _cache(model: Transformer, num_rows: int, router: Router) -> KVCache:
    weight, most = model.embedding.weight, router.num_recursions
    return KVCache(
        model.config, num_rows, num_recursions=most, device=weight.device, dtype=weight.dtype
    )


def _checked(
    model: Transformer,
    prompts: Any,
    params: Any,
    tokenizer: Tokenizer | None,
    max_depth: Any,
    depth: Any,
) -> tuple[list[Generation], list[Answer]]:
    check_max_depth(max_depth, model.config.num_recursions)
    if isinstance(prompts, str):
        prompts = [prompts]  # not only the list is missing, but the token ids
    answers = list[Answer]()
    for i, (prompt, own) in enumerate(zip(*per_prompt(prompts, params), strict=True)):
        with naming(f"prompt {i}"):
            own = with_default_depth(own, depth)
            answers.append(begin(model.config, prompt, own, tokenizer=tokenizer))
            check_budget(model, own.depth, max_depth)
    return [Generation(answer.prompt_ids, answer.token_ids) for answer in answers], answers


def begin(
    config: ModelConfig,
    prompt: Any,
    params: Any,
    *,
    tokenizer: Tokenizer | None = None,
    max_len: int | None = None,
) -> Answer:
    """The answer to a prompt, with no token yet. Raises ValueError for what :func:`check_prompt`
    and :class:`mor.answer.Answer` refuse."""
    ids = check_prompt(config, prompt, params, max_len=max_len)
    if tokenizer is not None and params.structure is not None:
        tokenizer.check_fits(config.vocab_size)
    return Answer(params, ids, tokenizer)


def with_default_depth(params: Any, depth: Depth) -> Any:
    """The same settings; ``depth`` where they name none."""
    if depth is None or not isinstance(params, SamplingParams) or params.depth is not None:
        return params
    return replace(params, depth=depth)


def check_budget(model: Transformer, depth: Depth, max_depth: int | None) -> Budget:
    """The thresholds of a depth. Raises ValueError for one that the model cannot have, or that the
    cap would take something from."""
    budget = budget_of(model, depth)
    if depth is not None and max_depth is not None:
        raise ValueError(
            f"max_depth={max_depth} would take tokens from depth={depth}; leave out one of them"
        )
    return budget


def per_prompt(prompts: Any, params: Any) -> tuple[list[Any], list[Any]]:
    """A list of prompts, and one of as many settings: the one given for all, or one for each.

    Raises ValueError if there are no prompts, if a single one is given in place of a list, or if
    the numbers differ. What is in the lists is for :func:`check_prompt`.
    """
    listed = _as_list(prompts)
    if listed is None or (listed and all(_as_id(value) is not None for value in listed)):
        raise ValueError(
            f"prompts must be a list of prompts, got {_short(prompts)}; put a single prompt into "
            "a list"
        )
    if not listed:
        raise ValueError("no prompts were given")
    if params is None or isinstance(params, SamplingParams):
        return listed, [params or SamplingParams()] * len(listed)
    settings = _as_list(params)
    if settings is None:
        raise ValueError(f"params must be SamplingParams or a list of them, got {_short(params)}")
    if len(settings) != len(listed):
        raise ValueError(
            f"got {len(settings)} sampling settings for {len(listed)} prompts; give one, or one "
            "per prompt"
        )
    return listed, settings


def check_prompt(
    config: ModelConfig, prompt: Any, params: Any, *, max_len: int | None = None
) -> list[int]:
    """The token ids of a prompt, as a list. Raises ValueError if the model cannot continue it.

    prompt: a list or another sequence of whole numbers, or a tensor or array of one dimension.
    max_len: most tokens of prompt and continuation together; None: what the model holds.
    """
    if not isinstance(params, SamplingParams):
        raise ValueError(f"the settings of a request must be SamplingParams, got {_short(params)}")
    listed = _as_list(prompt)
    if listed is None:
        raise ValueError(
            f"a prompt must be a list of token ids, got {_short(prompt)}; a tokenizer makes them "
            "of text"
        )
    ids = list[int]()
    for place, value in enumerate(listed):
        if (token_id := _as_id(value)) is None:
            raise ValueError(
                f"token ids must be whole numbers, got {_short(value)} at place {place}"
            )
        ids.append(token_id)
    if not ids:
        raise ValueError(
            "the prompt is empty; give at least one token, such as the end-of-text token"
        )
    named = {"the prompt": ids, "stop_token_ids": params.stop_token_ids}
    named["logit_bias"] = list(params.logit_bias)
    for name, given in named.items():
        if given and not 0 <= min(given) <= max(given) < config.vocab_size:
            raise ValueError(f"{name} has token ids outside 0..{config.vocab_size - 1}")
    longest = config.max_seq_len if max_len is None else max_len
    if len(ids) + params.max_new_tokens > longest:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and asks for {params.max_new_tokens} more, but a "
            f"request holds {longest} at most; shorten the prompt or lower max_new_tokens"
        )
    return ids


def _as_list(values: Any) -> list[Any] | None:
    """The values of a sequence, a tensor or an array; None for anything else, text included."""
    if hasattr(values, "tolist"):
        values = values.unbind() if getattr(values, "is_nested", False) else values.tolist()
    if isinstance(values, str | bytes | bytearray) or not isinstance(values, Sequence):
        return None
    return list(values)


def _as_id(value: Any) -> int | None:
    """A whole number, NumPy's and those of tensors included; None for anything else."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
