"""Whether routing works: numbers for the log, and a few words for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mor.model.packing import tally
from mor.model.routing import (
    ExpertChoiceRouter,
    FixedDepthRouter,
    Router,
    Routing,
    TokenChoiceRouter,
)
from mor.training.distributed import ALONE, Ranks


@torch.no_grad()
def router_health(
    router: Router, routings: Sequence[Routing], ranks: Ranks = ALONE
) -> dict[str, Any]:
    """What shows whether routing works, over the forwards of one step on all ranks.

    share_per_recursion: of all tokens. depth_entropy: of the depths that tokens took, 1 if all are
    equally frequent. dead_positions: share of columns in which no row reached the last recursion.
    agreement: share of decisions that threshold selection would have taken the same way
    (expert-choice). max_violation: how far the most chosen depth lies above the mean load
    (token-choice).
    """
    R = router.num_recursions
    taken = (
        torch.stack([r.selected_M(i).sum() for r in routings for i in range(R)]).view(-1, R).sum(0)
    )
    depths = torch.cat([r.depth_M for r in routings])
    load = tally(depths, R + 1)
    counts = ranks.sum(torch.cat([taken, load])).double()
    taken, load = counts[:R], counts[R:]
    share = load[1:] / load.sum()
    found: dict[str, Any] = {
        "mean_depth": float(taken.sum() / load.sum()),
        "share_per_recursion": (taken / load.sum()).tolist(),
    }
    if R == 1 or type(router) is FixedDepthRouter:
        return found
    found["depth_entropy"] = float(torch.special.entr(share).sum()) / math.log(R)
    reached = torch.stack([r.selected_BT(R - 1).any(0) for r in routings]).any(0)
    found["dead_positions"] = 1 - float(ranks.max(reached.float()).mean())
    if isinstance(router, ExpertChoiceRouter):
        found["agreement"] = _agreement(router, routings, ranks)
    if isinstance(router, TokenChoiceRouter):
        found["max_violation"] = float(share.max()) * R - 1
    return found


def _agreement(
    router: ExpertChoiceRouter, routings: Sequence[Routing], ranks: Ranks
) -> float | None:
    same = count = 0
    for routing in routings:
        for step in routing.steps:
            if step.causal_logit_C is None or routing.capacities[step.recursion] == 1:
                continue
            selected_M = routing.selected_M(step.recursion)
            chosen_C = selected_M if step.candidate_C is None else selected_M[step.candidate_C]
            same += int(
                (
                    chosen_C == (step.causal_logit_C.sigmoid() > router.threshold_R[step.recursion])
                ).sum()
            )
            count += chosen_C.numel()
    same, count = ranks.sum(
        torch.tensor([same, count], device=routings[0].tokens.row_M.device)
    ).tolist()
    return same / count if count else None


def health_text(health: Mapping[str, Any]) -> str:
    """Router health in a few words for the progress line."""
    if "depth_entropy" not in health:
        return f"depth {health['mean_depth']:.2f}"
    share = "/".join(f"{100 * s:.0f}" for s in health["share_per_recursion"])
    words = [
        f"depth {health['mean_depth']:.2f} ({share}%)",
        f"entropy {health['depth_entropy']:.2f}",
    ]
    words.append(f"dead {100 * health['dead_positions']:.0f}%")
    if health.get("agreement") is not None:
        words.append(f"agreement {100 * health['agreement']:.1f}%")
    if "max_violation" in health:
        words.append(f"MaxVio {health['max_violation']:.2f}")
    return " · ".join(words)
