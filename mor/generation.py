"""Decoding, plainly: prefill, then one token per sequence and step, each as deep as its router
asks.

The reference for every faster decoder. Sequences may have prompts of different lengths; finished
ones cost nothing. What a sequence draws depends on its own seed and position only.

B rows of the batch · T columns · V vocab
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from mor.files import naming
from mor.model.budget import Budget, Depth, budget_of, router_for
from mor.model.config import ModelConfig
from mor.model.kv_cache import KVCache
from mor.model.random import hash_uniform
from mor.model.routers import Router
from mor.model.transformer import Output, Transformer, check_depth, check_finite
from mor.settings import (
    Listed,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    Settings,
    Share,
)


def _plain(value: Any) -> Any:
    """Numbers of NumPy and of tensors as Python's, alone and in lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


_Plain = BeforeValidator(_plain)
PositiveDepth = Annotated[float, Field(ge=1)]


class SamplingParams(Settings):
    """How one request samples. temperature=0 is greedy; top_k=0 and top_p=1 keep every token.
    Numbers and lists may be NumPy's or tensors.

    logprobs: also give the log-probability of each new token (of the model, before temperature and
    cuts).
    depth: the mean depth of the request's tokens, prompt included, from 1 on (model/budget.py);
    "full": every trained recursion for every token; None: the model's own rule.
    """

    max_new_tokens: Annotated[PositiveInt, _Plain] = 128
    temperature: Annotated[NonNegativeFloat, _Plain] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**63), _Plain] = 0
    top_p: Annotated[Share, _Plain] = 1.0
    seed: Annotated[Seed, _Plain] = 0
    stop_token_ids: Annotated[Listed[tuple[NonNegativeInt, ...]], _Plain] = ()
    logprobs: bool = False
    depth: Annotated[PositiveDepth | Literal["full"] | None, _Plain] = None


def sample(logits: Tensor, params: SamplingParams, counter: int) -> int:
    """One token from one row of logits; ``counter`` numbers the draws of a request.

    Raises ValueError for logits that are not finite.
    """
    check_finite(logits)
    if params.temperature == 0:
        return int(logits.argmax())
    ordered, ids = logits.sort(descending=True, stable=True)
    if params.top_k:
        ordered, ids = ordered[: params.top_k], ids[: params.top_k]
    # With the largest at 0, the smallest temperature overflows to minus infinity alone.
    probability = ((ordered.double() - ordered[0]) / params.temperature).softmax(0)
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
    router: Router | None = None,
) -> Output:
    """Read prompts of any length into an empty cache; logits of each last token, (B, 1, V)."""
    device = model.embedding.weight.device
    width = max(map(len, prompts))
    tokens_BT = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=device)
    length_B1 = torch.tensor([[len(p)] for p in prompts], device=device)
    mask_BT = torch.arange(width, device=device) < length_B1
    return model(
        tokens_BT, mask_BT=mask_BT, cache=cache, logits="last", max_depth=max_depth, router=router
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
    max_depth: int | None = None,
    depth: Depth = None,
) -> Iterator[TokenEvent]:
    """Every new token as soon as it is known. Arguments and errors as in :func:`generate`."""
    return _decode(model, *_checked(model, prompts, params, max_depth, depth), max_depth)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    max_depth: int | None = None,
    depth: Depth = None,
) -> list[Generation]:
    """Continue token prompts, all together.

    prompts: a list of lists (or tensors) of token ids. params: one for all, or one per prompt.
    max_depth caps the recursions of every token. depth: the mean depth of requests whose params
    name none (see :class:`SamplingParams`). Raises ValueError, before anything runs, for what
    :func:`check_prompt` refuses, for a max_depth beyond the model and a depth that it cannot have;
    and for a model whose logits are not finite.
    """
    results, settings = _checked(model, prompts, params, max_depth, depth)
    for _ in _decode(model, results, settings, max_depth):
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
    weight = model.embedding.weight
    router = router_for(model, [own.depth for own in params])
    cache = KVCache(
        model.config,
        len(prompts),
        num_recursions=router.num_recursions,
        device=weight.device,
        dtype=weight.dtype,
    )
    output = prefill(model, prompts, cache, max_depth=max_depth, router=router)
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
        newest = [r.token_ids[-1] for r in results]
        output = decode_step(model, newest, active, cache, max_depth=max_depth, router=router)


def _checked(
    model: Transformer, prompts: Any, params: Any, max_depth: Any, depth: Any
) -> tuple[list[Generation], list[SamplingParams]]:
    check_depth(max_depth, model.config.num_recursions)
    if isinstance(prompts, str):
        prompts = [prompts]  # not only the list is missing, but the token ids
    results, (listed, settings) = list[Generation](), per_prompt(prompts, params)
    for i, (prompt, own) in enumerate(zip(listed, settings, strict=True)):
        with naming(f"prompt {i}"):
            results.append(Generation(check_prompt(model.config, prompt, own)))
            settings[i] = with_default_depth(own, depth)
            check_budget(model, settings[i].depth, max_depth)
    return results, settings


def with_default_depth(params: SamplingParams, depth: Depth) -> SamplingParams:
    """The same settings; ``depth`` where they name none."""
    if depth is None or params.depth is not None:
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
    for name, given in (("the prompt", ids), ("stop_token_ids", params.stop_token_ids)):
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
