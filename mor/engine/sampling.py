"""Sampling for many requests at once; draws what ``mor.generation.sample`` draws for each alone.

K largest logits · M rows · V vocab
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mor.generation import SamplingParams
from mor.model.random import hash_uniform


@dataclass(frozen=True)
class SamplingRows:
    """The settings of each row's request, and how many tokens it has drawn."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    counter: Tensor

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], counters: Sequence[int], device: torch.device
    ) -> SamplingRows:
        exact = [(p.temperature, p.top_p) for p in params]
        whole = [(p.top_k, p.seed, n) for p, n in zip(params, counters, strict=True)]
        temperature, top_p = torch.tensor(exact, dtype=torch.float64).to(device).unbind(1)
        top_k, seed, counter = torch.tensor(whole).to(device).unbind(1)
        return cls(temperature, top_k, top_p, seed, counter)

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


def next_tokens(
    logits_MV: Tensor, params: Sequence[SamplingParams], counters: Sequence[int]
) -> tuple[list[int | None], list[float] | list[None]]:
    """One token of each row, and its log-probability if any of the requests asks for it. None where
    the logits are not finite.

    counters: tokens that each request has drawn before.
    """
    # As the CPU's head makes them, the logits of a row lie far apart; a copy takes less time than
    # going through them so.
    logits_MV = logits_MV.contiguous()
    needed = [most_needed(p) for p in params]
    if not any(n != 0 for n in needed):
        token = logits_MV.max(-1).indices  # on a CPU several times as fast as argmax, and equal
    else:
        rows = SamplingRows.of(params, counters, logits_MV.device)
        best = None if None in needed else max(n or 0 for n in needed)
        token = sample_rows(logits_MV, rows, best)
    finite = finite_rows(logits_MV).tolist()
    tokens = [t if known else None for t, known in zip(token.tolist(), finite, strict=True)]
    if not any(p.logprobs for p in params):
        return tokens, [None] * len(params)
    return tokens, logprob_rows(logits_MV, token).tolist()
