"""Exits chosen after training, on one trained model: at random, when the early prediction is sure,
by an oracle.

The model runs once for every depth with all tokens going that deep; then every token is given the
prediction of the depth where a policy lets it out. So a token's context is always as deep as the
token itself: nothing is lost by others leaving early, which no real decoder can promise. The
figures say how much there is to gain from choosing the depth token by token, not what an engine
would reach.

M tokens with a target · R recursions
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mor.analysis.views import TableRouter, with_router
from mor.data.stream import Windows
from mor.model.loss import IGNORED
from mor.model.random import hash_uniform
from mor.model.transformer import Transformer


@torch.inference_mode()
def early_exits(
    model: Transformer, data: Windows, seq_len: int, max_windows: int
) -> dict[str, Any]:
    """NLL in nats of each policy at the mean depth of the model's capacities, and of every fixed
    depth.

    random: exits drawn; confidence: a token leaves when the probability of its likeliest next token
    passes a threshold, chosen so that the mean depth fits; oracle: knows the target and spends
    depth where it gains most.
    """
    nll_MR, sure_MR = _by_depth(model, data, seq_len, max_windows)
    mean_depth = (
        sum(model.config.capacities)
        if model.config.family == "mor"
        else (model.config.num_recursions + 1) / 2
    )
    found: dict[str, Any] = {"mean_depth": mean_depth, "fixed": nll_MR.mean(0).tolist()}
    for name, policy in POLICIES.items():
        depth_M = policy(nll_MR, sure_MR, mean_depth)
        nll_M = nll_MR.gather(1, depth_M[:, None] - 1)
        found[name] = {"nll": float(nll_M.mean()), "mean_depth": float(depth_M.double().mean())}
    return found


def _by_depth(
    model: Transformer, data: Windows, seq_len: int, max_windows: int
) -> tuple[Tensor, Tensor]:
    """NLL and largest probability after each recursion, (M, R) each."""
    available = data.windows(seq_len)
    count = min(max_windows, available)
    chosen = [i * available // count for i in range(count)]
    R = model.config.num_recursions
    nll: list[list[Tensor]] = [[] for _ in range(R)]
    sure: list[list[Tensor]] = [[] for _ in range(R)]
    for start in range(0, count, 16):
        batch = data.batch(chosen[start : start + 16], seq_len)
        tokens_BT, targets_BT = (
            x.to(model.embedding.weight.device) for x in (batch.tokens_BT, batch.targets_BT)
        )
        for r in range(R):  # one depth at a time: logits are large
            nll_M, sure_M = _predictions(all_to_depth(model, tokens_BT, r + 1), targets_BT)
            nll[r].append(nll_M.double().cpu())
            sure[r].append(sure_M.double().cpu())
    return torch.stack([torch.cat(x) for x in nll], 1), torch.stack([torch.cat(x) for x in sure], 1)


def all_to_depth(model: Transformer, tokens_BT: Tensor, depth: int) -> Tensor:
    """Logits (B, T, V) with every token in the first ``depth`` recursions, whatever the router
    would decide."""
    wanted_R = torch.arange(model.config.num_recursions, device=tokens_BT.device) < depth
    table_RM = wanted_R[:, None].expand(-1, tokens_BT.numel())
    view = with_router(model, TableRouter(model.recursions.router, table_RM))
    return view(tokens_BT, max_depth=depth).logits_BTV


def _predictions(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """NLL of the target and probability of the likeliest token, where there is a target, (M,)
    each."""
    asked_BT = targets_BT != IGNORED
    logits_MV = logits_BTV[asked_BT].float()
    total_M = logits_MV.logsumexp(-1)
    target_M = logits_MV.gather(1, targets_BT[asked_BT][:, None])[:, 0]
    return total_M - target_M, (logits_MV.amax(-1) - total_M).exp()


def random_exits(nll_MR: Tensor, sure_MR: Tensor, mean_depth: float) -> Tensor:
    """After every recursion a token stays with the same probability, whatever it is."""
    M, R = nll_MR.shape
    _, stay = _solve(lambda p: float(sum(p**r for r in range(R))) - mean_depth, 0.0, 1.0)
    share_R = torch.tensor([stay**r for r in range(R)], dtype=torch.float64)
    return (hash_uniform(0, torch.arange(M))[:, None] < share_R).sum(1)


def confident_exits(nll_MR: Tensor, sure_MR: Tensor, mean_depth: float) -> Tensor:
    """The first depth whose prediction is sure enough; the last one if none is."""
    last = nll_MR.shape[1]

    def depth_M(limit: float) -> Tensor:
        unsure_MR = (sure_MR[:, : last - 1] < limit).long()
        return 1 + unsure_MR.cumprod(1).sum(1)

    below, above = _solve(lambda x: float(depth_M(x).double().mean()) - mean_depth, 0.0, 1.0 + 1e-6)
    return _between(depth_M(below), depth_M(above), mean_depth)


def oracle_exits(nll_MR: Tensor, sure_MR: Tensor, mean_depth: float) -> Tensor:
    """For a price per recursion every token takes its cheapest depth; the price is what gives the
    mean depth."""
    cost_R = torch.arange(nll_MR.shape[1], dtype=torch.float64)

    def depth_M(price: float) -> Tensor:
        return 1 + (nll_MR + price * cost_R).argmin(1)

    if float(depth_M(0.0).double().mean()) <= mean_depth:  # deeper would only be worse
        return depth_M(0.0)
    below, above = _solve(
        lambda p: mean_depth - float(depth_M(p).double().mean()), 0.0, float(nll_MR.max()) + 1
    )
    return _between(depth_M(above), depth_M(below), mean_depth)


def _between(shallow_M: Tensor, deep_M: Tensor, mean_depth: float) -> Tensor:
    """The mean depth where tokens are equal, and a limit takes all or none of them deep: as many as
    it needs go, in an order that knows nothing of them."""
    order_M = hash_uniform(1, torch.arange(len(deep_M))).argsort()
    more_M = (deep_M - shallow_M)[order_M]
    more_M[more_M.cumsum(0) > mean_depth * len(deep_M) - shallow_M.sum()] = 0
    return shallow_M.index_add(0, order_M, more_M)


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
