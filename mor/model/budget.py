"""Depth budgets: how deep a model goes on average is a number that whoever runs it may choose.

A budget is a mean number of recursions per token, from 1 to beyond the trained ones. It is a rule
for each token by itself: the token takes a recursion if its score there reaches a threshold, and
the budget says which threshold. So it is as causal as the router inside, and requests with
different budgets may share a pass.

From budget to thresholds it is two steps. *Shares*: which part of all tokens takes each recursion,
so that the mean is the budget (:func:`shares_of`). *Thresholds*: what score a recursion must ask
for, so that this part reaches it. For routers whose scores spread evenly over 0..1 that is one
minus the share; for those that learn, text tells (mor/evaluation/calibrate.py), and a
:class:`DepthTable` keeps it.

M packed tokens · C candidates · B rows of the batch · D model · R recursions, further ones included
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mor.model.config import ModelConfig
from mor.model.other_depths import RouterAround
from mor.model.packing import PackedTokens
from mor.model.routers import Router
from mor.model.routing import Decision, Memory
from mor.settings import Listed, NonNegativeInt, Settings

if TYPE_CHECKING:
    from mor.model.transformer import Transformer

Depth = float | Literal["full"] | None
"""A mean depth; ``full``: every token takes every trained recursion; None: the model's own rule."""

NOBODY, EVERYONE = 1e30, -1e30
"""Thresholds that no score reaches, and that every score does. Finite, as files ask for it."""
_OWN = 2e30  # in place of thresholds: the router inside decides
RAISED = 2 / 3
"""How far the trained recursions open before further ones do (measured: LOG.md)."""
GRID_STEP = 0.25
"""Budgets of a table lie no further apart than this, unless those between cannot be had."""


def corners(config: ModelConfig, deepest: int) -> list[tuple[float, ...]]:
    """Shares of tokens at each recursion, between which the shares for all budgets lie.

    From one recursion for everyone, the trained recursions open one after the other, each up to the
    share that it was trained with; then all of them rise together by ``RAISED`` of what is missing;
    then further ones open one after the other; in the end everyone takes all. No share ever falls.
    """
    trained = config.num_recursions
    own = [1.0, *config.capacities[1:]]
    raised = [share + RAISED * (1 - share) for share in own]
    falling = raised[-1] / raised[-2]
    further = [raised[-1] * falling ** (j + 1) for j in range(deepest - trained)]
    found = [own[:r] for r in range(1, trained + 1)]
    found += [raised + further[:j] for j in range(deepest - trained + 1)]
    found.append([1.0] * deepest)
    filled = (tuple(shares + [0.0] * (deepest - len(shares))) for shares in found)
    return list(dict.fromkeys(filled))


def shares_of(corner: Sequence[tuple[float, ...]], budget: float) -> tuple[float, ...]:
    """The shares with this mean depth, on the straight lines between the corners."""
    for low, high in pairwise(corner):
        if budget <= sum(high):
            part = (budget - sum(low)) / (sum(high) - sum(low))
            return tuple(a + part * (b - a) for a, b in zip(low, high, strict=True))
    return corner[-1]


MeanDepth = Annotated[float, Field(ge=0)]
Threshold = Annotated[float, Field(ge=EVERYONE, le=NOBODY)]


class DepthTable(Settings, prefix="depth_table"):
    """What budgets ask of scores, as measured for a model's weights.

    budgets: mean depths, ascending. thresholds: for each of them and each recursion from the
    second, the score that a token needs there. ``nobody``: a threshold that no score reaches.
    tokens: of the text that it was measured on. spent: mean depths on text that the thresholds were
    not fitted to, by kind of text, for the budgets ``checked``.
    """

    budgets: Listed[tuple[MeanDepth, ...]]
    thresholds: Listed[tuple[Listed[tuple[Threshold, ...]], ...]]
    nobody: Threshold = NOBODY
    tokens: NonNegativeInt = 0
    checked: Listed[tuple[MeanDepth, ...]] = ()
    spent: dict[str, Listed[tuple[MeanDepth, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        budgets, rows = self.budgets, self.thresholds
        rising = all(a < b for a, b in pairwise(budgets))
        fits = len(rows) == len(budgets) and len({len(row) for row in rows}) == 1
        same = all(len(spent) == len(self.checked) for spent in self.spent.values())
        if not (budgets and rising and fits and same):
            raise ValueError(
                "depth_table is damaged: it needs rising budgets, and as many rows of equally many "
                "thresholds; make it again with mor calibrate"
            )

    @property
    def deepest(self) -> int:
        """Recursions that any token may take."""
        return len(self.thresholds[0]) + 1

    def reachable(self) -> list[tuple[float, float]]:
        """Ranges of budgets that can be had: between neighbours that lie close together."""
        ranges = [[self.budgets[0], self.budgets[0]]]
        for low, high in pairwise(self.budgets):
            if high - low <= 1.5 * GRID_STEP:
                ranges[-1][1] = high
            else:
                ranges.append([high, high])
        return [(low, high) for low, high in ranges]

    def has(self, budget: float) -> bool:
        """Whether this budget can be had."""
        return any(low <= budget <= high for low, high in self.reachable())

    def at(self, budget: float) -> list[float]:
        """Thresholds of each recursion from the second. Raises ValueError for a budget that cannot
        be had, naming those that can."""
        for low, high in self.reachable():
            if low <= budget <= high:
                return self._between(budget)
            for edge in (low, high):  # such as a depth of 1.98 where 2 can be had
                if abs(edge - budget) <= 0.01 * budget:
                    return self._between(edge)
        deeper = ""
        if budget > self.deepest:
            deeper = f"; mor calibrate --deepest {math.ceil(budget)} would have more"
        raise ValueError(
            f"depth={budget:g} cannot be had from this model; it has {self.shown()}{deeper}"
        )

    def shown(self) -> str:
        """The budgets that can be had, in words."""
        return ", ".join(
            f"{a:.4g} to {b:.4g}" if a < b else f"{a:.4g}" for a, b in self.reachable()
        )

    def _between(self, budget: float) -> list[float]:
        place = min(bisect_right(self.budgets, budget), len(self.budgets) - 1)
        low, high = self.budgets[max(place - 1, 0)], self.budgets[place]
        part = (budget - low) / (high - low) if high > low else 0.0
        rows = self.thresholds[max(place - 1, 0)], self.thresholds[place]
        return [_mix(a, b, part) for a, b in zip(*rows, strict=True)]

    def recursions(self, budget: float) -> int:
        """How many recursions any token takes with this budget."""
        return 1 + sum(threshold < self.nobody for threshold in self.at(budget))


def _mix(low: float, high: float, part: float) -> float:
    """The number at this part of the way; where one of the two is no number of scores, the
    other."""
    if part in (0, 1):
        return high if part else low
    if abs(low) >= NOBODY or abs(high) >= NOBODY:
        return high if abs(low) >= NOBODY else low
    return low + part * (high - low)


def even_table(config: ModelConfig, deepest: int) -> DepthTable:
    """For routers whose scores spread evenly over 0..1: nothing needs to be measured."""
    found = corners(config, deepest)
    steps = [math.ceil((sum(b) - sum(a)) / GRID_STEP) for a, b in pairwise(found)]
    budgets = [
        sum(a) + (sum(b) - sum(a)) * i / n
        for (a, b), n in zip(pairwise(found), steps, strict=True)
        for i in range(n)
    ]
    budgets.append(float(deepest))
    rows = [tuple(1 - share for share in shares_of(found, b)[1:]) for b in budgets]
    return DepthTable(budgets=tuple(budgets), thresholds=tuple(rows), nobody=1.0)


def default_deepest(config: ModelConfig) -> int:
    """How far budgets go unless somebody says otherwise: twice the trained recursions."""
    return 2 * config.num_recursions


def check_can_budget(config: ModelConfig) -> None:
    """Raise ValueError for a model without a choice of depths."""
    if config.num_recursions == 1:
        raise ValueError(
            "a model with one recursion has one depth: leave out depth, or take a model with "
            "num_recursions >= 2"
        )
    if config.shared_order != "cycle":
        raise ValueError(
            "depth needs shared_order='cycle': in 'sequence' a layer repeats before the next one "
            "starts, so there is no pass of the whole stack to leave out"
        )


def has_depths(config: ModelConfig) -> bool:
    """Whether tokens of a model may be sent to other depths than its own."""
    return config.num_recursions > 1 and config.shared_order == "cycle"


def has_table(model: Transformer) -> bool:
    """Whether budgets may be asked of a model: it was calibrated, or needs no calibration."""
    return has_depths(model.config) and (
        model.depth_table is not None or not model.router.is_learned
    )


def table_of(model: Transformer) -> DepthTable:
    """The table that a model's budgets follow. Raises ValueError for a model without a choice of
    depths, and for one whose router learns and was not calibrated."""
    check_can_budget(model.config)
    if model.depth_table is not None:
        return model.depth_table
    if model.router.is_learned:
        raise ValueError(
            "this model does not know what a depth asks of its router's scores; run mor calibrate "
            "on its checkpoint (mor.evaluation.calibrate in Python)"
        )
    return even_table(model.config, default_deepest(model.config))


def budgets_to_check(trained: int, deepest: int) -> list[float]:
    """As people ask for them: halves up to the trained recursions, then whole ones."""
    halves = [1 + i / 2 for i in range(1, 2 * (trained - 1) + 1)]
    return halves + [float(depth) for depth in range(trained + 1, deepest + 1)]


def curve_depths(model: Transformer) -> list[float | Literal["full"]]:
    """Depths that show what a model does with more and less, from 1 on: those of
    :func:`budgets_to_check` that it can have, and "full". Raises ValueError as :func:`table_of`."""
    table, trained = table_of(model), model.config.num_recursions
    found = [b for b in (1.0, *budgets_to_check(trained, table.deepest)) if table.has(b)]
    within = [b for b in found if b <= trained]
    return [*within, "full", *found[len(within) :]]


def plain_number(depth: Any) -> Any:
    """A number of NumPy or a tensor of one as Python's own; anything else as it is."""
    return depth.item() if getattr(depth, "ndim", None) == 0 else depth


def check_depth(depth: Any) -> None:
    """Raise ValueError for what is no :data:`Depth`."""
    is_number = isinstance(depth, int | float) and not isinstance(depth, bool)
    if not (depth is None or depth == "full" or (is_number and 1 <= depth < math.inf)):
        raise ValueError(
            f"depth must be a mean number of recursions from 1 on, or 'full', got {depth!r}"
        )


@dataclass(frozen=True)
class Budget:
    """A depth, for one model: the thresholds of its ``recursions`` from the second. own: the
    model's own rule."""

    recursions: int
    thresholds: tuple[float, ...]
    own: bool = False

    @property
    def key(self) -> bytes:
        """Equal for equal budgets."""
        return b"" if self.own else repr(self.thresholds).encode()

    def row(self, recursions: int) -> list[float]:
        """Thresholds of as many recursions, the first included."""
        if self.own:
            return [_OWN] * recursions
        return [EVERYONE, *self.thresholds, *[NOBODY] * (recursions - 1 - len(self.thresholds))]


def budget_of(model: Transformer, depth: Depth) -> Budget:
    """What a depth means for a model. Raises ValueError for one that cannot be had."""
    depth = plain_number(depth)
    check_depth(depth)
    trained = model.config.num_recursions
    if depth is None or (depth == "full" and model.config.router.kind == "fixed"):
        return Budget(trained, (), own=True)
    if depth == "full":
        return Budget(trained, (EVERYONE,) * (trained - 1))
    table = table_of(model)
    count = table.recursions(depth)
    return Budget(count, tuple(table.at(depth)[: count - 1]))


def router_for(model: Transformer, depth: Depth | Sequence[Depth], *, at_least: int = 1) -> Router:
    """The router for a forward with this depth: one for all rows of the batch, or one for each.

    ``model(tokens, router=router_for(model, 2.2))``. A cache needs as many recursions as the router
    has: ``KVCache(config, batch, num_recursions=router.num_recursions)``. at_least: recursions that
    it has, should no token take so many. Raises ValueError for a depth that cannot be had.
    """
    depth = plain_number(depth)
    depths = [depth] if depth is None or isinstance(depth, int | float | str) else list(depth)
    budgets = [budget_of(model, each) for each in depths]
    if all(budget.own for budget in budgets):
        return model.router
    most = max(at_least, *(budget.recursions for budget in budgets))
    rows = torch.tensor([budget.row(most) for budget in budgets], dtype=torch.float32)
    with_own = any(budget.own for budget in budgets)
    return BudgetRouter(model.router, rows.to(model.embedding.weight.device), with_own=with_own)


class BudgetRouter(RouterAround):
    """Decides by thresholds of its own, one row of them for each row of the batch; gates and
    everything else are those of the router inside. A further recursion is decided and gated as the
    last trained one.

    threshold_BR: what scores must reach; one row is for all. Each token carries its own along in
    its memory. with_own: whether some rows leave it to the router inside.
    """

    def __init__(self, inner: Router, threshold_BR: Tensor, *, with_own: bool = True) -> None:
        super().__init__(inner, threshold_BR.shape[1])
        self.with_own = with_own
        self.has_topk = False
        self.threshold_BR = threshold_BR

    def start(self, x_MD: Tensor, tokens: PackedTokens, max_depth: int) -> Memory:
        memory = self.inner.start(x_MD, tokens, min(max_depth, self.inner.num_recursions))
        rows, columns = tokens.batch_shape
        if len(self.threshold_BR) not in (1, rows):
            raise ValueError(
                f"got {len(self.threshold_BR)} depths for a batch of {rows} rows; give one, or one "
                "for each"
            )
        one = len(self.threshold_BR) == 1
        row = torch.zeros_like(tokens.place) if one else tokens.place // columns
        return self.with_thresholds(memory, self.threshold_BR[row])

    def with_thresholds(self, memory: Memory, threshold_MR: Tensor) -> Memory:
        """The memory with these thresholds for each token. Where depths are chosen before the first
        recursion, they are chosen by them."""
        memory = memory | {"threshold": threshold_MR}
        chosen = self.inner.chosen_depth(memory)
        if chosen is None:
            return memory
        depth = torch.ones_like(chosen)
        for recursion in range(1, self.num_recursions):
            urge = self.inner.urge(self._trained(recursion), None, None, memory)
            depth = depth + ((depth == recursion) & (urge >= threshold_MR[:, recursion]))
        own = threshold_MR[:, 0] > NOBODY
        return self.inner.with_depth(memory, torch.where(own, chosen, depth))

    def decide(
        self, recursion: int, h_CD: Tensor, tokens: PackedTokens, memory: Memory, capacity: float
    ) -> Decision:
        decided = self.inner.decide(self._trained(recursion), h_CD, tokens, memory, capacity)
        if recursion == 0 and decided.takes is None:
            return replace(decided, rank=None)
        if (depth := self.inner.chosen_depth(memory)) is not None:
            return replace(decided, takes=depth > recursion, rank=None)
        threshold = memory["threshold"][:, recursion]
        urge = self.inner.urge(self._trained(recursion), decided, tokens, memory)
        takes = urge >= threshold
        if not self.with_own:
            return replace(decided, takes=takes, rank=None)
        own = decided.takes
        if recursion >= self.inner.num_recursions:
            own = torch.zeros_like(takes)
        elif own is None:
            own = torch.ones_like(takes)
        return replace(decided, takes=torch.where(threshold > NOBODY, own, takes), rank=None)

    def threshold(self, recursion: int) -> float | None:
        """That of a budget is one for logits; None where rows differ."""
        if self.inner.threshold(self._trained(recursion)) is None or len(self.threshold_BR) > 1:
            return None
        return float(self.threshold_BR[0, recursion].sigmoid())

    def _trained(self, recursion: int) -> int:
        """The trained recursion that this one does as."""
        return min(recursion, self.inner.num_recursions - 1)
