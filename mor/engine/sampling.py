"""Sampling for many requests at once; draws what ``mor.generation.sample`` draws for each alone.

M rows · V vocab
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
        return cls(
            torch.tensor([p.temperature for p in params], dtype=torch.float64, device=device),
            torch.tensor([p.top_k for p in params], device=device),
            torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
            torch.tensor([p.seed for p in params], device=device),
            torch.tensor(counters, device=device),
        )

    @classmethod
    def greedy(cls, num_rows: int, device: torch.device) -> SamplingRows:
        return cls.of([SamplingParams(temperature=0)] * num_rows, [0] * num_rows, device)

    def at(self, index: Tensor) -> SamplingRows:
        return SamplingRows(*(getattr(self, f.name)[index] for f in fields(self)))

    def put(self, index: Tensor, rows: SamplingRows) -> None:
        for f in fields(self):
            getattr(self, f.name)[index] = getattr(rows, f.name)


def sample_rows(logits_MV: Tensor, rows: SamplingRows) -> Tensor:
    """One token of each row of logits, (M,); any where they are not finite."""
    greedy = rows.temperature == 0
    # With the largest at 0, the smallest temperature overflows to minus infinity alone.
    scaled_MV = logits_MV.double() - logits_MV.amax(1, keepdim=True)
    scaled_MV = scaled_MV / torch.where(greedy, 1.0, rows.temperature)[:, None]
    sorted_MV, id_MV = scaled_MV.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits_MV.shape[1], device=logits_MV.device)
    cut_MV = (rows.top_k[:, None] > 0) & (rank >= rows.top_k[:, None])
    probability_MV = sorted_MV.masked_fill(cut_MV, float("-inf")).softmax(-1)
    below_MV = probability_MV.cumsum(-1) - probability_MV
    # Keep the fewest best tokens that reach top_p.
    kept_MV = probability_MV * (below_MV < rows.top_p[:, None])
    cumulative_MV = kept_MV.cumsum(-1)
    draw = hash_uniform(rows.seed, rows.counter) * cumulative_MV[:, -1]
    rank_M1 = torch.searchsorted(cumulative_MV, draw[:, None], right=True)
    rank_M1 = torch.minimum(rank_M1, (kept_MV > 0).sum(-1, keepdim=True) - 1)
    rank_M1 = rank_M1.clamp(min=0)  # of logits that are not finite none is kept
    return torch.where(greedy, logits_MV.argmax(-1), id_MV.gather(1, rank_M1)[:, 0])


def finite_rows(logits_MV: Tensor) -> Tensor:
    """Whether all logits of each row are finite, (M,): there is nothing to draw from the others."""
    return logits_MV.isfinite().all(-1)


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
    if all(p.temperature == 0 for p in params):  # sorting the vocabulary is slow
        token = logits_MV.argmax(-1)
    else:
        token = sample_rows(logits_MV, SamplingRows.of(params, counters, logits_MV.device))
    finite = finite_rows(logits_MV).tolist()
    tokens = [t if known else None for t, known in zip(token.tolist(), finite, strict=True)]
    if not any(p.logprobs for p in params):
        return tokens, [None] * len(params)
    return tokens, logprob_rows(logits_MV, token).tolist()
