"""Sampling for many requests at once; draws what ``mor.generation.sample`` draws for each alone.

K largest logits · M rows · V vocab
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mor.answer import Answer, allowed_rows
from mor.generation import SamplingParams, TopLogprobs
from mor.model.random import hash_uniform


@dataclass(frozen=True)
class SamplingRows:
    """The settings of each row's request, and how many tokens it has drawn."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    seed: Tensor
    counter: Tensor

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], counters: Sequence[int], device: torch.device
    ) -> SamplingRows:
        exact = [(p.temperature, p.top_p, p.log_min_p) for p in params]
        whole = [(p.top_k, p.seed, n) for p, n in zip(params, counters, strict=True)]
        on_device = torch.tensor(exact, dtype=torch.float64).to(device)
        temperature, top_p, log_min_p = on_device.unbind(1)
        top_k, seed, counter = torch.tensor(whole).to(device).unbind(1)
        return cls(temperature, top_k, top_p, log_min_p, seed, counter)

    @classmethod
    def greedy(cls, num_rows: int, device: torch.device) -> SamplingRows:
        return cls.of([SamplingParams(temperature=0)] * num_rows, [0] * num_rows, device)

    def at(self, index: Tensor) -> SamplingRows:
        return SamplingRows(*(getattr(self, f.name)[index] for f in fields(self)))

    def put(self, index: Tensor, rows: SamplingRows) -> None:
        for f in fields(self):
            getattr(self, f.name)[index] = getattr(rows, f.name)


def sample_rows(logits_MV: Tensor, rows: SamplingRows, best: int | None = None) -> Tensor:
    """One token of each row of logits, (M,); any where they are not finite.

    best: at least the largest top_k, if every row that is not greedy has one: then only so many
    logits are put in order, not the whole vocabulary.
    """
    greedy = rows.temperature == 0
    logits_MK, id_MK = _in_order(logits_MV, best)
    # With the largest at 0, the smallest temperature overflows to minus infinity alone.
    scaled_MK = logits_MK.double() - logits_MK[:, :1]
    sorted_MK = scaled_MK / torch.where(greedy, 1.0, rows.temperature)[:, None]
    rank = torch.arange(sorted_MK.shape[1], device=logits_MV.device)
    cut_MK = (rows.top_k[:, None] > 0) & (rank >= rows.top_k[:, None])
    probability_MK = sorted_MK.masked_fill(cut_MK, float("-inf")).softmax(-1)
    below_MK = probability_MK.cumsum(-1) - probability_MK
    # Keep the fewest best tokens that reach top_p.
    kept_MK = probability_MK * (below_MK < rows.top_p[:, None])
    kept_MK = kept_MK * (sorted_MK >= rows.log_min_p[:, None])
    cumulative_MK = kept_MK.cumsum(-1)
    draw = hash_uniform(rows.seed, rows.counter) * cumulative_MK[:, -1]
    rank_M1 = torch.searchsorted(cumulative_MK, draw[:, None], right=True)
    rank_M1 = torch.minimum(rank_M1, (kept_MK > 0).sum(-1, keepdim=True) - 1)
    rank_M1 = rank_M1.clamp(min=0)  # of logits that are not finite none is kept
    return torch.where(greedy, logits_MV.argmax(-1), id_MK.gather(1, rank_M1)[:, 0])


def _in_order(logits_MV: Tensor, best: int | None) -> tuple[Tensor, Tensor]:
    """The largest logits of each row and their ids, both (M, K); of equal ones the lower id comes
    first. They are put in order as they are: a temperature does not change it."""
    vocab_size = logits_MV.shape[1]
    if best is None or best >= vocab_size or logits_MV.dtype == torch.float64:
        return logits_MV.sort(dim=-1, descending=True, stable=True)
    # Of equal values topk returns any. So it is given integers that are all different: above, the
    # bits of the logit, which are ordered as integers once those of negative numbers are turned
    # round; below, the place from the end of the vocabulary.
    bits_MV = (logits_MV.float() + 0.0).view(torch.int32)  # + 0.0: minus zero becomes zero
    ordered_MV = (bits_MV ^ ((bits_MV >> 31) & 0x7FFFFFFF)).long()
    from_end = torch.arange(vocab_size - 1, -1, -1, device=logits_MV.device)
    id_MK = ((ordered_MV << 32) + from_end).topk(best, dim=-1).indices
    return logits_MV.gather(1, id_MK), id_MK


def most_needed(params: SamplingParams) -> int | None:
    """How many of the largest logits a draw looks at: 0 if it is greedy, None for all of them."""
    return 0 if params.temperature == 0 else params.top_k or None


def finite_rows(logits_MV: Tensor) -> Tensor:
    """Whether all logits of each row are finite, (M,): there is nothing to draw from the others."""
    # Looking at the extremes makes no copy of the logits; nan is both, and compares as false.
    return (logits_MV.amin(-1) > float("-inf")) & (logits_MV.amax(-1) < float("inf"))


def logprob_rows(logits_MV: Tensor, token: Tensor) -> Tensor:
    """Log-probability of one token of each row, (M,), fp64."""
    logits_MV = logits_MV.double()
    return logits_MV.gather(1, token[:, None])[:, 0] - logits_MV.logsumexp(-1)


def adjusted_rows(logits_MV: Tensor, answers: Sequence[Answer]) -> Tensor:
    """What ``mor.generation.adjusted`` makes of each row, for the answer that it belongs to."""
    in_place = torch.float64 if logits_MV.dtype == torch.float64 else torch.float32
    logits_MV = logits_MV.to(in_place, copy=True)
    _change(logits_MV, answers)
    if structured := [i for i, answer in enumerate(answers) if answer.grammars is not None]:
        allowed = allowed_rows([answers[i] for i in structured], logits_MV.shape[1])
        forbidden = torch.from_numpy(~allowed).to(logits_MV.device)
        for i, forbidden_there in zip(structured, forbidden, strict=True):
            logits_MV[i].masked_fill_(forbidden_there, float("-inf"))
    for i, answer in enumerate(answers):
        if answer.grammars is None and answer.banned_ids:
            logits_MV[i, list(answer.banned_ids)] = float("-inf")
    return logits_MV


def _change(logits_MV: Tensor, answers: Sequence[Answer]) -> None:
    """Apply bias and penalties, in place."""
    found = [(i, *a.changes.now) for i, a in enumerate(answers) if a.changes is not None]
    if not found:
        return
    rows, ids, of_each = zip(*found, strict=True)
    index = np.stack([np.repeat(rows, list(map(len, ids))), np.concatenate(ids)])
    row, column = torch.from_numpy(index).to(logits_MV.device)
    changes = torch.from_numpy(np.concatenate(of_each)).to(logits_MV.device)
    add, factor, less = changes.unbind(1)
    value = logits_MV[row, column].double() + add
    value = torch.where(value > 0, value / factor, value * factor) - less
    logits_MV[row, column] = value.to(logits_MV.dtype)


class Drawn(NamedTuple):
    """token_id: None if there is none, then ``error`` says why. logprob, top: None unless any
    request of the batch asks for them."""

    token_id: int | None
    logprob: float | None = None
    top: TopLogprobs | None = None
    error: str | None = None


def next_tokens(logits_MV: Tensor, answers: Sequence[Answer]) -> list[Drawn]:
    """The next token of each answer, drawn from its row of logits."""
    # As the CPU's head makes them, the logits of a row lie far apart; a copy takes less time than
    # going through them so.
    logits_MV = logits_MV.contiguous()
    changed = any(answer.changes_logits for answer in answers)
    from_MV = adjusted_rows(logits_MV, answers) if changed else logits_MV
    token = _draw(from_MV, answers)
    finite = finite_rows(logits_MV)
    # Where every token is forbidden, so is the one that was drawn.
    possible = from_MV.gather(1, token[:, None])[:, 0] > float("-inf") if changed else finite
    drawn = [
        Drawn(token_id)
        if is_finite and may
        else Drawn(None, error=answer.impossible() if is_finite else None)
        for token_id, is_finite, may, answer in zip(
            token.tolist(), finite.tolist(), possible.tolist(), answers, strict=True
        )
    ]
    return _with_logprobs(drawn, logits_MV, answers)


def _draw(logits_MV: Tensor, answers: Sequence[Answer]) -> Tensor:
    params = [answer.params for answer in answers]
    needed = [most_needed(p) for p in params]
    if not any(n != 0 for n in needed):
        return logits_MV.max(-1).indices  # on a CPU several times as fast as argmax, and equal
    counters = [len(answer.token_ids) for answer in answers]
    rows = SamplingRows.of(params, counters, logits_MV.device)
    best = None if None in needed else max(n or 0 for n in needed)
    return sample_rows(logits_MV, rows, best)


def _with_logprobs(drawn: list[Drawn], logits_MV: Tensor, answers: Sequence[Answer]) -> list[Drawn]:
    """With log-probabilities under the model, if any of the answers asks for them."""
    count = max(answer.params.top_logprobs for answer in answers)
    if not count and not any(answer.params.logprobs for answer in answers):
        return drawn
    scores = score_rows(logits_MV, [d.token_id or 0 for d in drawn], count)
    return [
        d._replace(logprob=logprob, top=top[: answer.params.top_logprobs])
        for d, (logprob, top), answer in zip(drawn, scores, answers, strict=True)
    ]


def score_rows(
    logits_MV: Tensor, ids: Sequence[int], count: int
) -> list[tuple[float, TopLogprobs]]:
    """For each row, the log-probability of one token, and of the ``count`` likeliest as
    :func:`mor.generation.top_logprobs` has them."""
    found = list[tuple[float, TopLogprobs]]()
    for start in range(0, len(ids), 64):  # in fp64 a prompt's logits would be large
        part_MV, own = logits_MV[start : start + 64], ids[start : start + 64]
        token = torch.tensor(own, device=part_MV.device)
        top = _top_rows(part_MV, count) if count else [[]] * len(own)
        found += zip(logprob_rows(part_MV, token).tolist(), top, strict=True)
    return found


def _top_rows(logits_MV: Tensor, count: int) -> list[TopLogprobs]:
    logits_MK, id_MK = (found[:, :count] for found in _in_order(logits_MV, count))
    logprob_MK = logits_MK.double() - logits_MV.double().logsumexp(-1, keepdim=True)
    return [
        list(zip(*row, strict=True))
        for row in zip(id_MK.tolist(), logprob_MK.tolist(), strict=True)
    ]
