"""Exits chosen after training, on one trained model: at random, when the early prediction is sure,
by an oracle.

The model runs once for every depth with all tokens going that deep; then every token is given the
prediction of the depth at which a policy lets it exit. So a token's context is always as deep as
the token itself: nothing is lost because others exit early, which no real decoder can promise. The
figures say how much there is to gain from choosing the depth token by token, not what an engine
would reach.

B batch · T tokens · M tokens with a target, or all B x T · R depths · V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mor.data.stream import Windows
from mor.device import autocast
from mor.evaluation.finite import require_finite
from mor.evaluation.nll import place_of, window_length
from mor.model.loss import IGNORED
from mor.model.other_depths import ForcedRouter
from mor.model.random import hash_uniform
from mor.model.transformer import Transformer


@torch.inference_mode()
def early_exits(
    model: Transformer,
    data: Windows,
    seq_len: int,
    max_windows: int,
    *,
    document_mask: bool = False,
) -> dict[str, Any]:
    """NLL in nats of each policy at the mean depth of the model's capacities, and of every fixed
    depth from the least one on (0 where the model leaves tokens out of every recursion).

    random: exits are drawn.
    confidence: a token exits once the probability of its likeliest next token passes a threshold,
    chosen so that the mean depth fits.
    oracle: knows the target and spends depth where it gains most.
    document_mask: as in :func:`mor.evaluation.nll.evaluate`, whose windows these are.
    """
    nll_MR, confidence_MR = _by_depth(model, data, seq_len, max_windows, document_mask)
    mean_depth = (
        sum(model.config.capacities)
        if model.config.family == "mor"
        else (model.config.num_recursions + 1) / 2
    )
    found: dict[str, Any] = {"mean_depth": mean_depth, "fixed": nll_MR.mean(0).tolist()}
    before_first = 1 - model.config.least_depth  # policies number the depths there are from 1
    for name, policy in POLICIES.items():
        place = policy(nll_MR, confidence_MR, mean_depth + before_first)
        nll, mean = nll_MR.gather(1, place[:, None] - 1).mean(), place.double().mean()
        found[name] = {"nll": float(nll), "mean_depth": float(mean) - before_first}
    return found


def _by_depth(
    model: Transformer, data: Windows, seq_len: int, max_windows: int, document_mask: bool
) -> tuple[Tensor, Tensor]:
    """NLL and largest probability at each depth that tokens may take, (M, R) each."""
    depths = range(model.config.least_depth, model.config.num_recursions + 1)
    nll: list[list[Tensor]] = [[] for _ in depths]
    confidence: list[list[Tensor]] = [[] for _ in depths]
    length = window_length(model, seq_len)
    for some in data.scored(length, max_windows, documents=document_mask):
        device = model.embedding.weight.device
        tokens_BT, targets_BT, documents_BT = some.batch.to(device)
        for place, depth in enumerate(depths):  # one depth at a time: logits are large
            with autocast(device):
                logits_BTV = all_to_depth(model, tokens_BT, depth, documents_BT)
            require_finite(model, [logits_BTV], place_of(some))
            new_nll, new_confidence = _predictions(logits_BTV, targets_BT)
            nll[place].append(new_nll.double().cpu())
            confidence[place].append(new_confidence.double().cpu())
    nll_MR = torch.stack([torch.cat(found) for found in nll], 1)
    return nll_MR, torch.stack([torch.cat(found) for found in confidence], 1)


def all_to_depth(
    model: Transformer, tokens_BT: Tensor, depth: int, documents_BT: Tensor | None = None
) -> Tensor:
    """Logits (B, T, V) with every token taking exactly the first ``depth`` recursions."""
    wanted = torch.arange(model.config.num_recursions, device=tokens_BT.device) < depth
    table_RM = wanted[:, None].expand(-1, tokens_BT.numel())
    forced = ForcedRouter(model.router, table_RM)
    output = model(tokens_BT, max_depth=max(1, depth), router=forced, documents_BT=documents_BT)
    return output.logits_BTV


def _predictions(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """NLL of each target, and probability of the likeliest token there, (M,) each."""
    asked_BT = targets_BT != IGNORED
    logits_MV = logits_BTV[asked_BT].float()
    total = logits_MV.logsumexp(-1)
    target = logits_MV.gather(1, targets_BT[asked_BT][:, None])[:, 0]
    return total - target, (logits_MV.amax(-1) - total).exp()


def random_exits(nll_MR: Tensor, confidence_MR: Tensor, mean_depth: float) -> Tensor:
    """After every recursion each token stays with the same probability."""
    M, R = nll_MR.shape
    _, stay = _solve(lambda p: float(sum(p**r for r in range(R))) - mean_depth, 0.0, 1.0)
    share = torch.tensor([stay**r for r in range(R)], dtype=torch.float64)
    return (hash_uniform(0, torch.arange(M))[:, None] < share).sum(1)


def confident_exits(nll_MR: Tensor, confidence_MR: Tensor, mean_depth: float) -> Tensor:
    """The first depth whose prediction is confident enough; the last one if none is."""
    last = nll_MR.shape[1]

    def depth(limit: float) -> Tensor:
        unsure_MR = (confidence_MR[:, : last - 1] < limit).long()
        return 1 + unsure_MR.cumprod(1).sum(1)

    below, above = _solve(lambda x: float(depth(x).double().mean()) - mean_depth, 0.0, 1.0 + 1e-6)
    return _between(depth(below), depth(above), mean_depth)


def oracle_exits(nll_MR: Tensor, confidence_MR: Tensor, mean_depth: float) -> Tensor:
    """Every token takes the depth that costs least at a price per recursion; the price is the one
    that gives the mean depth."""
    cost = torch.arange(nll_MR.shape[1], dtype=torch.float64)

    def depth(price: float) -> Tensor:
        return 1 + (nll_MR + price * cost).argmin(1)

    if float(depth(0.0).double().mean()) <= mean_depth:  # deeper would only be worse
        return depth(0.0)
    below, above = _solve(
        lambda p: mean_depth - float(depth(p).double().mean()), 0.0, float(nll_MR.max()) + 1
    )
    return _between(depth(above), depth(below), mean_depth)


def _between(shallow: Tensor, deep: Tensor, mean_depth: float) -> Tensor:
    """Reach the mean depth where tokens tie at the limit: as many of them go deeper as it takes, in
    a pseudo-random order."""
    order = hash_uniform(1, torch.arange(len(deep))).argsort()
    more = (deep - shallow)[order]
    more[more.cumsum(0) > mean_depth * len(deep) - shallow.sum()] = 0
    return shallow.index_add(0, order, more)


def _solve(rising: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """Where a rising (step) function passes 0: the nearest places found below and above."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) >= 0 else (middle, high)
    return low, high


POLICIES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "random": random_exits,
    "confidence": confident_exits,
    "oracle": oracle_exits,
}
