"""Decoding, plainly: prefill, then one token per sequence and step, each as deep as its router
asks.

The reference for every faster decoder. Sequences may have prompts of different lengths; finished
ones cost nothing. What a sequence draws depends on its own seed and position only.

B rows of the batch · T columns · V vocab
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mor.model.kv_cache import KVCache
from mor.model.random import hash_uniform
from mor.model.transformer import Output, Transformer, check_finite
from mor.settings import (
    Listed,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    Settings,
    Share,
)


class SamplingParams(Settings):
    """How one request samples. temperature=0 is greedy; top_k=0 and top_p=1 keep every token.

    logprobs: also give the log-probability of each new token (of the model, before temperature and
    cuts).
    """

    max_new_tokens: PositiveInt = 128
    temperature: NonNegativeFloat = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**63)] = 0
    top_p: Share = 1.0
    seed: Seed = 0
    stop_token_ids: Listed[tuple[NonNegativeInt, ...]] = ()
    logprobs: bool = False


def sample(logits: Tensor, params: SamplingParams, counter: int) -> int:
    """One token from one row of logits; ``counter`` numbers the draws of a request.

    Raises ValueError for logits that are not finite.
    """
    check_finite(logits)
    if params.temperature == 0:
        return int(logits.argmax())
    scaled = (logits.double() - logits.max()) / params.temperature  # never overflows upwards
    ordered, ids = scaled.sort(descending=True, stable=True)
    if params.top_k:
        ordered, ids = ordered[: params.top_k], ids[: params.top_k]
    probability = ordered.softmax(0)
    below = probability.cumsum(0) - probability
    kept = probability * (below < params.top_p)  # the fewest best tokens that reach top_p
    cumulative = kept.cumsum(0)
    draw = hash_uniform(params.seed, counter).to(cumulative.device) * cumulative[-1]
    place = min(int(torch.searchsorted(cumulative, draw, right=True)), int((kept > 0).sum()) - 1)
    return int(ids[place])


def logprob(logits: Tensor, token_id: int) -> float:
    """Of one token, in nats. Raises ValueError for logits that are not finite."""
    check_finite(logits)
    return float(logits[token_id].double() - logits.double().logsumexp(0))


@dataclass(frozen=True)
class TokenEvent:
    """A new token of sequence ``index``. source_depth: recursions of the one that predicted it."""

    index: int
    token_id: int
    source_depth: int
    finish_reason: Literal["stop", "length"] | None


@dataclass
class Generation:
    """token_ids: the new tokens, a stop token included. depths: recursions that each prompt token
    and each new one took; the last new token was never read, so it has none."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def mean_depth(self) -> float:
        return sum(self.depths) / len(self.depths)


def prefill(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    cache: KVCache,
    *,
    max_depth: int | None = None,
) -> Output:
    """Read prompts of any length into an empty cache; logits of each last token, (B, 1, V)."""
    device = model.embedding.weight.device
    width = max(map(len, prompts))
    tokens_BT = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=device)
    length_B1 = torch.tensor([[len(p)] for p in prompts], device=device)
    mask_BT = torch.arange(width, device=device) < length_B1
    return model(tokens_BT, mask_BT=mask_BT, cache=cache, logits="last", max_depth=max_depth)


def decode_step(
    model: Transformer,
    token: Sequence[int],
    active: Sequence[bool],
    cache: KVCache,
    *,
    max_depth: int | None = None,
) -> Output:
    """Read one token of every active sequence; logits (B, 1, V), zeros where inactive."""
    device = model.embedding.weight.device
    tokens_B1 = torch.tensor(token, device=device)[:, None]
    mask_B1 = torch.tensor(active, device=device)[:, None]
    return model(tokens_B1, mask_BT=mask_B1, cache=cache, logits="last", max_depth=max_depth)


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    max_depth: int | None = None,
) -> Iterator[TokenEvent]:
    """Yield every new token as soon as it is known. Arguments as in :func:`generate`."""
    results = [Generation(list(p)) for p in prompts]
    yield from _decode(model, results, _per_prompt(params, len(prompts)), max_depth)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    max_depth: int | None = None,
) -> list[Generation]:
    """Continue token prompts, all together.

    params: one for all, or one per prompt. max_depth caps the recursions of every token.
    Raises ValueError for empty prompts, ids outside the vocabulary, sequences too long for the
    model, and a model whose logits are not finite.
    """
    results = [Generation(list(p)) for p in prompts]
    for _ in _decode(model, results, _per_prompt(params, len(prompts)), max_depth):
        pass
    return results


@torch.inference_mode()
def _decode(
    model: Transformer,
    results: list[Generation],
    params: list[SamplingParams],
    max_depth: int | None,
) -> Iterator[TokenEvent]:
    """Fill ``results`` in place, yielding each token."""
    prompts = [result.prompt_ids for result in results]
    _check_prompts(model, prompts, params)
    weight = model.embedding.weight
    cache = KVCache(model.config, len(prompts), device=weight.device, dtype=weight.dtype)
    output = prefill(model, prompts, cache, max_depth=max_depth)
    while True:
        depths = output.routing.depths_by_row()
        for i, result in enumerate(results):
            if result.finish_reason is not None:
                continue
            result.depths += depths[i]
            token = sample(output.logits_BTV[i, 0], params[i], len(result.token_ids))
            result.token_ids.append(token)
            if params[i].logprobs:
                result.logprobs.append(logprob(output.logits_BTV[i, 0], token))
            if token in params[i].stop_token_ids:
                result.finish_reason = "stop"
            elif len(result.token_ids) == params[i].max_new_tokens:
                result.finish_reason = "length"
            yield TokenEvent(i, token, result.depths[-1], result.finish_reason)
        active = [result.finish_reason is None for result in results]
        if not any(active):
            return
        output = decode_step(
            model, [r.token_ids[-1] for r in results], active, cache, max_depth=max_depth
        )


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(
            f"got {len(params)} sampling settings for {count} prompts; give one, or one per prompt"
        )
    return list(params)


def _check_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], params: list[SamplingParams]
) -> None:
    if not prompts:
        raise ValueError("no prompts were given")
    config = model.config
    for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        if not prompt:
            raise ValueError(
                f"prompt {i} is empty; give at least one token, such as the end-of-text token"
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {i} has token ids outside 0..{config.vocab_size - 1}")
        if len(prompt) + p.max_new_tokens > config.max_seq_len:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens and asks for {p.max_new_tokens} more, but "
                f"the model holds {config.max_seq_len}; shorten the prompt or lower max_new_tokens"
            )
