"""Exits decided after the fact, on one trained model: at random, when the early prediction is sure, by an oracle.

The model runs once for every depth with all tokens going that deep; then every token is given the prediction of the
depth where a policy lets it out. So a token's context is always as deep as the token itself: nothing is lost by others
leaving early, which no real decoder can promise. The figures say how much there is to gain from choosing the depth
token by token, not what an engine would reach.

M tokens with a target · R recursions
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mor.data import Windows
from mor.hashing import hash_uniform
from mor.loss import IGNORED
from mor.model import Transformer


@torch.inference_mode()
def early_exits(model: Transformer, data: Windows, seq_len: int, max_windows: int) -> dict[str, Any]:
    """NLL in nats of each policy at the mean depth of the model's capacities, and of every fixed depth.

    random: exits drawn; confidence: a token leaves when the probability of its likeliest next token passes a
    threshold, chosen so that the mean depth fits; oracle: knows the target and spends depth where it gains most.
    """
    nll_MR, sure_MR = _by_depth(model, data, seq_len, max_windows)
    mean_depth = sum(model.config.capacities) if model.config.family == "mor" else (model.config.num_recursions + 1) / 2
    found: dict[str, Any] = {"mean_depth": mean_depth, "fixed": nll_MR.mean(0).tolist()}
    for name, policy in POLICIES.items():
        depth_M = policy(nll_MR, sure_MR, mean_depth)
        nll_M = nll_MR.gather(1, depth_M[:, None] - 1)
        found[name] = {"nll": float(nll_M.mean()), "mean_depth": float(depth_M.double().mean())}
    return found


def _by_depth(model: Transformer, data: Windows, seq_len: int, max_windows: int) -> tuple[Tensor, Tensor]:
    """NLL and largest probability after each recursion, (M, R) each."""
    available = data.windows(seq_len)
    count = min(max_windows, available)
    chosen = [i * available // count for i in range(count)]
    R = model.config.num_recursions
    nll, sure = [], []
    for start in range(0, count, 16):
        batch = data.batch(chosen[start : start + 16], seq_len)
        asked_BT = batch.targets_BT != IGNORED
        target_M1 = batch.targets_BT[asked_BT][:, None]
        log_MRV = torch.stack(
            [
                model(batch.tokens_BT, capacities=(1.0,) * R, max_depth=r).logits_BTV[asked_BT].log_softmax(-1)
                for r in range(1, R + 1)
            ],
            1,
        )
        nll.append(-log_MRV.gather(2, target_M1[:, None].expand(-1, R, 1))[..., 0])
        sure.append(log_MRV.amax(-1).exp())
    return torch.cat(nll).double(), torch.cat(sure).double()


def random_exits(nll_MR: Tensor, sure_MR: Tensor, mean_depth: float) -> Tensor:
    """After every recursion a token stays with the same probability, whatever it is."""
    M, R = nll_MR.shape
    stay = _solve(lambda p: float(sum(p**r for r in range(R))) - mean_depth, 0.0, 1.0)
    share_R = torch.tensor([stay**r for r in range(R)], dtype=torch.float64)
    return (hash_uniform(0, torch.arange(M))[:, None] < share_R).sum(1)


def confident_exits(nll_MR: Tensor, sure_MR: Tensor, mean_depth: float) -> Tensor:
    """The first depth whose prediction is sure enough; the last one if none is."""
    last = nll_MR.shape[1]

    def depth_M(limit: float) -> Tensor:
        unsure_MR = (sure_MR[:, : last - 1] < limit).long()
        return 1 + unsure_MR.cumprod(1).sum(1)

    limit = _solve(lambda x: float(depth_M(x).double().mean()) - mean_depth, 0.0, 1.0 + 1e-9)
    return depth_M(limit)


def oracle_exits(nll_MR: Tensor, sure_MR: Tensor, mean_depth: float) -> Tensor:
    """For a price per recursion every token takes its cheapest depth; the price is what gives the mean depth."""
    cost_R = torch.arange(nll_MR.shape[1], dtype=torch.float64)

    def depth_M(price: float) -> Tensor:
        return 1 + (nll_MR + price * cost_R).argmin(1)

    if float(depth_M(0.0).double().mean()) <= mean_depth:  # deeper would only be worse
        return depth_M(0.0)
    price = _solve(lambda p: mean_depth - float(depth_M(p).double().mean()), 0.0, float(nll_MR.max()) + 1)
    return depth_M(price)


def _solve(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising (step) function passes 0, from above."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) >= 0 else (middle, high)
    return high


POLICIES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "random": random_exits,
    "confidence": confident_exits,
    "oracle": oracle_exits,
}
