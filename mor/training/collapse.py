"""Routers that have stopped working, told in plain words while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mor.model.config import RouterConfig

SHUT = 0.01
"""Of the gate's scale: a mean below it lets nothing of a recursion through, and no gradient in."""

_AGAINST_COLLAPSE = {
    "aux_loss": "raise router.selection_weight",
    "aux_router": "raise router.selection_weight",
    "gain": "ask for a depth, or raise full_depth_share or exit_share",
    "loss": "raise router.balancing_weight",
    "loss_free": "raise router.bias_update_rate",
    "none": "set router.balancing to 'loss'",
}


def collapse_message(empty: Sequence[int], router: RouterConfig) -> str | None:
    """Plain words if causal selection leaves recursions (from 1) without tokens, with what this
    router can do about it; None for a router that does not learn where tokens go."""
    learnt_by = {"expert_choice": router.causal_selection, "token_choice": router.balancing}
    if not empty or (found := learnt_by.get(router.kind)) is None:
        return None
    return (
        f"no validation token takes recursion {', '.join(map(str, empty))}: the router has "
        f"collapsed, or is not trained yet. If it stays so, {_AGAINST_COLLAPSE[found]}"
    )


def shut_message(shut: Sequence[int], router: RouterConfig) -> str | None:
    """The same if recursions have tokens, and gates that let nothing through."""
    if not shut:
        return None
    other = "" if router.reads == "direction" else ", or set router.reads='direction'"
    return (
        f"the gate of recursion {', '.join(map(str, shut))} is shut: what tokens compute there "
        f"changes nothing and learns nothing. If it stays so, lower optim.lr{other}"
    )


def shut_gates(health: Mapping[str, Any], router: RouterConfig) -> list[int]:
    """The recursions (from 1) that tokens take for nothing. health: that of a step, see
    :meth:`mor.model.routers.Router.health`."""
    gates, shares = health.get("gate_per_recursion", ()), health.get("share_per_recursion", ())
    both = enumerate(zip(gates, shares, strict=False), start=1)
    return [r for r, (gate, share) in both if share > 0 and gate < SHUT * router.gate_scale]


@dataclass
class CollapseWatch:
    """Reports once what stays wrong from one validation to the next, or is wrong at the end: early
    in a run a router may be on its way."""

    router: RouterConfig
    empty: set[int] = field(default_factory=set)
    shut: set[int] = field(default_factory=set)
    reported: set[tuple[str, int]] = field(default_factory=set)

    def messages(
        self, validation_shares: Sequence[float], health: Mapping[str, Any], *, last: bool
    ) -> list[str]:
        """What is to be said after a validation. health: of the step that was logged last."""
        empty = {r for r, share in enumerate(validation_shares, start=1) if share == 0}
        shut = set(shut_gates(health, self.router))
        lasting = {("empty", r) for r in (empty if last else empty & self.empty)}
        lasting |= {("shut", r) for r in (shut if last else shut & self.shut)}
        new = sorted(lasting - self.reported)
        self.empty, self.shut = empty, shut
        still = {("empty", r) for r in empty} | {("shut", r) for r in shut}
        self.reported = self.reported & still | lasting
        found = (
            collapse_message([r for what, r in new if what == "empty"], self.router),
            shut_message([r for what, r in new if what == "shut"], self.router),
        )
        return [message for message in found if message]
