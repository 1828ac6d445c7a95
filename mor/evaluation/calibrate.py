"""What depth budgets ask of a router's scores, measured on text.

For each budget one forward over the same windows: each recursion takes the share of tokens that the
budget wants there, those with the highest scores, and the lowest of these is the threshold. So
each threshold is fitted to the states that the thresholds before it lead to. Where a router
predicts the gain of a recursion, which is on one scale for all of them, one threshold serves them
all, and forwards with ever finer ones show what each spends (better there: LOG.md). Nothing is
drawn at random: equal weights and text give equal tables.

B batch · C candidates · D model · M packed tokens · T tokens
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from mor.data.stream import Batch, Windows
from mor.device import autocast
from mor.evaluation.finite import require_finite, values_of
from mor.evaluation.nll import window_length
from mor.files import naming
from mor.model.budget import (
    EVERYONE,
    GRID_STEP,
    NOBODY,
    BudgetRouter,
    DepthTable,
    budgets_to_check,
    check_can_budget,
    corners,
    default_deepest,
    router_for,
    shares_of,
)
from mor.model.config import ModelConfig
from mor.model.other_depths import RouterAround
from mor.model.packing import PackedTokens
from mor.model.routers import Router
from mor.model.routing import Decision, Memory
from mor.model.transformer import Transformer

FITTED_TOKENS = 8_192
"""Tokens that thresholds are fitted to, unless somebody says otherwise."""


WIDEST, CLOSE = 64.0, 1e-6
"""Logits of gains lie within the one; thresholds closer than the other are not told apart."""
FINE = 0.08
"""Neighbours of a table with one threshold spend no more than this share apart."""
LEAST_TOKENS = 1_024
"""With fewer, a mean depth is off by some percent or more."""


def num_forwards(config: ModelConfig, deepest: int | None = None) -> int:
    """Forwards over the windows of one half that a calibration takes, about."""
    most = default_deepest(config) if deepest is None else deepest
    return len(_grid(corners(config, most))) + len(budgets_to_check(config.num_recursions, most))


@dataclass
class Fit:
    """thresholds: of each recursion from the second. taken: tokens that took each recursion."""

    thresholds: list[float]
    taken: list[int]


class FittingRouter(RouterAround):
    """Sends the wanted share of all tokens of a forward into each recursion, and notes the
    threshold that does so. It compares tokens with later ones: for measuring alone."""

    def __init__(self, inner: Router, shares: Sequence[float]) -> None:
        super().__init__(inner, len(shares))
        self.has_topk, self.shares = False, shares
        self.found = Fit([], [])

    def start(self, x_MD: Tensor, tokens: PackedTokens, max_depth: int) -> Memory:
        memory = self.inner.start(x_MD, tokens, min(max_depth, self.inner.num_recursions))
        self.total, self.found = len(tokens), Fit([], [len(tokens)])
        if self.inner.chosen_depth(memory) is None:
            return memory
        going = torch.ones_like(tokens.row, dtype=torch.bool)
        depth = going.long()
        for recursion in range(1, self.num_recursions):
            urge = self.inner.urge(self._trained(recursion), None, None, memory)
            going = going & (urge >= self._note(recursion, urge[going]))
            depth = depth + going
        return self.inner.with_depth(memory, depth)

    def decide(
        self, recursion: int, h_CD: Tensor, tokens: PackedTokens, memory: Memory, capacity: float
    ) -> Decision:
        trained = self._trained(recursion)
        decided = self.inner.decide(trained, h_CD, tokens, memory, capacity)
        if recursion == 0:
            return replace(decided, takes=None, rank=None)
        if (depth := self.inner.chosen_depth(memory)) is not None:
            return replace(decided, takes=depth > recursion, rank=None)
        urge = self.inner.urge(trained, decided, tokens, memory)
        return replace(decided, takes=urge >= self._note(recursion, urge), rank=None)

    def _note(self, recursion: int, urge: Tensor) -> float:
        threshold = threshold_for(urge, round(self.shares[recursion] * self.total))
        self.found.thresholds.append(threshold)
        self.found.taken.append(int((urge >= threshold).sum()))
        return threshold

    def _trained(self, recursion: int) -> int:
        return min(recursion, self.inner.num_recursions - 1)


def threshold_for(score: Tensor, count: int) -> float:
    """What about ``count`` of the scores reach: as near as equal scores allow."""
    if count <= 0 or not len(score):
        return NOBODY
    if count >= len(score):
        return EVERYONE
    ordered = score.double().sort(descending=True).values
    last = ordered[count - 1]
    above, reached = int((ordered > last).sum()), int((ordered >= last).sum())
    if count - above < reached - count:  # many have the last one's score; better without them
        return NOBODY if not above else float((ordered[above - 1] + last) / 2)
    if reached == len(ordered):
        return EVERYONE
    return float((last + ordered[reached]) / 2)


def calibrate(
    model: Transformer,
    data: Windows,
    *,
    seq_len: int | None = None,
    max_windows: int | None = None,
    deepest: int | None = None,
    kinds: Mapping[str, Windows] | None = None,
    document_mask: bool = False,
    step: Callable[[float], None] = lambda done: None,
) -> DepthTable:
    """Measure what each budget asks for, and give the model the table.

    Every other window is what thresholds are fitted to; the others show what is spent then.
    seq_len: tokens in a window; None: the model's context. max_windows: of each of the two halves;
    None: for about ``FITTED_TOKENS`` tokens. deepest: recursions that a budget may go to; None:
    twice the trained ones. kinds: other text to check on, by name. step: called with the part that
    is done.

    Raises ValueError for a model without a choice of depths, data of less than two windows, and
    if the model gives NaN or infinity.
    """
    check_can_budget(model.config)
    deepest = default_deepest(model.config) if deepest is None else deepest
    if deepest < model.config.num_recursions:
        raise ValueError(
            f"deepest={deepest} is below the model's {model.config.num_recursions} recursions; "
            "budgets of any size up to them are part of every table"
        )
    length = window_length(model, seq_len)
    most = max_windows or max(1, math.ceil(FITTED_TOKENS / length))
    fitted, unseen = _halves(data, length, most, document_mask)
    shown = {"held out": unseen}
    for name, windows in (kinds or {}).items():
        with naming(name):
            some = windows.spread(length, most)
        shown[name] = windows.batch(some, length, documents=document_mask)
    if fitted.tokens_BT.numel() < LEAST_TOKENS:
        warnings.warn(
            f"fitted to {fitted.tokens_BT.numel():,} tokens alone: with fewer than "
            f"{LEAST_TOKENS:,}, what is spent may be far from what is asked for; give more text or "
            "windows",
            stacklevel=2,
        )
    table = fit_table(model, fitted, deepest, step=lambda done: step(0.7 * done))
    checked = [b for b in budgets_to_check(model.config.num_recursions, deepest) if table.has(b)]
    model.depth_table = table
    spent = {}
    for i, (name, batch) in enumerate(shown.items()):
        spent[name] = tuple(mean_depth(model, batch, budget) for budget in checked)
        step(0.7 + 0.3 * (i + 1) / len(shown))
    model.depth_table = replace(table, checked=tuple(checked), spent=spent)
    return model.depth_table


Deciding = Callable[[Tensor], Router]
"""Makes the router of thresholds for each recursion, (1, R)."""


def fit_table(
    model: Transformer,
    batch: Batch,
    deepest: int,
    *,
    deciding: Deciding | None = None,
    wanted: Sequence[float] | None = None,
    step: Callable[[float], None] = lambda done: None,
) -> DepthTable:
    """What budgets of up to ``deepest`` recursions ask for, fitted to a batch of text.

    deciding: another rule than the model's own, with one threshold for all its recursions. wanted:
    the budgets that will be asked for, if no others will: what does not matter to them is not
    measured. step: called with the part that is done.
    """
    if deciding is None and not model.router.one_scale:
        found = _by_shares(model, batch, deepest, wanted)
    else:
        rule = deciding or partial(_own, model)
        found = _by_one_threshold(model, batch, deepest, rule, wanted)
    about, fits = num_forwards(model.config, deepest), list[Fit]()
    for fit in found:
        fits.append(fit)
        step(min(1, len(fits) / about))
    return _table(fits, batch.tokens_BT.numel())


def _own(model: Transformer, threshold_1R: Tensor) -> Router:
    return BudgetRouter(model.router, threshold_1R, with_own=False)


def _halves(data: Windows, length: int, most: int, documents: bool) -> tuple[Batch, Batch]:
    chosen = data.spread(length, 2 * most)
    if len(chosen) < 2:
        raise ValueError(
            f"the data ({data.describe()}) holds less than two windows of {length} tokens: one to "
            "fit to and one to check on; give more text, or lower seq_len"
        )
    halves = chosen[::2], chosen[1::2]
    fitted, unseen = (data.batch(some, length, documents=documents) for some in halves)
    return fitted, unseen


def _grid(path: Sequence[Sequence[float]]) -> list[float]:
    """Budgets to measure: the corners, and between them often enough. Just beyond a corner a
    recursion opens, and its threshold comes from nobody's; so there is one there as well."""
    found = []
    for low, high in pairwise(map(sum, path)):
        parts = max(1, math.ceil((high - low) / (0.8 * GRID_STEP)))
        found += [low, low + 0.03 * (high - low)]
        found += [low + (high - low) * i / parts for i in range(1, parts)]
    last = sum(path[-1])
    return [*found, last - 0.03 * (last - found[-1]), last]


def _by_shares(
    model: Transformer, batch: Batch, deepest: int, wanted: Sequence[float] | None
) -> Iterator[Fit]:
    """Thresholds of each recursion for itself, along the path of shares."""
    path = corners(model.config, deepest)
    grid = _grid(path)
    for budget in grid if wanted is None else _around(grid, wanted):
        yield _fit(model, batch, shares_of(path, budget))


def _around(grid: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """The points on both sides of each wanted budget."""
    pairs = [(a, b) for a, b in pairwise(grid) if any(a <= each <= b for each in wanted)]
    return sorted({point for pair in pairs for point in pair})


def _by_one_threshold(
    model: Transformer,
    batch: Batch,
    deepest: int,
    deciding: Deciding,
    wanted: Sequence[float] | None,
) -> Iterator[Fit]:
    """One threshold for all recursions: what the next one promises is worth it or not, whichever it
    is. Halved between neighbours until these spend about as much."""

    def at(threshold: float) -> Fit:
        return _at(model, batch, [threshold] * (deepest - 1), deciding)

    pairs = [(at(WIDEST), at(-WIDEST))]
    tokens = batch.tokens_BT.numel()
    yield Fit([NOBODY] * (deepest - 1), [tokens] + [0] * (deepest - 1))
    yield Fit([EVERYONE] * (deepest - 1), [tokens] * deepest)
    yield from pairs[0]
    while pairs:
        few, many = pairs.pop()
        high, low = few.thresholds[0], many.thresholds[0]
        spent, more = sum(few.taken) / tokens, sum(many.taken) / tokens
        matters = wanted is None or any(spent < each < more for each in wanted)
        wide = more - spent > min(0.8 * GRID_STEP, FINE * spent)
        if matters and wide and high - low > CLOSE:
            middle = at((high + low) / 2)
            yield middle
            pairs += [(few, middle), (middle, many)]


@torch.inference_mode()
def _at(model: Transformer, batch: Batch, thresholds: list[float], deciding: Deciding) -> Fit:
    row = torch.tensor([[EVERYONE, *thresholds]])
    router = deciding(row.to(model.embedding.weight.device))
    return Fit(thresholds, _taken(model, batch, router))


@torch.inference_mode()
def _fit(model: Transformer, batch: Batch, shares: Sequence[float]) -> Fit:
    router = FittingRouter(model.router, shares)
    _taken(model, batch, router)
    left = len(shares) - len(router.found.taken)
    return Fit(router.found.thresholds + [NOBODY] * left, router.found.taken + [0] * left)


def _taken(model: Transformer, batch: Batch, router: Router) -> list[int]:
    """Tokens of a batch that take each recursion."""
    device = model.embedding.weight.device
    here = batch.to(device)
    with autocast(device):
        output = model(here.tokens_BT, documents_BT=here.documents_BT, router=router, logits="none")
    require_finite(model, values_of(output), "in the text to calibrate on")
    return output.routing.tokens_per_recursion()


@torch.inference_mode()
def mean_depth(model: Transformer, batch: Batch, depth: float) -> float:
    """What a budget spends on a batch."""
    return sum(_taken(model, batch, router_for(model, depth))) / batch.tokens_BT.numel()


def _table(fits: Sequence[Fit], tokens: int) -> DepthTable:
    """A row for each mean depth that was reached, in order. Recursions that nobody took are closed,
    so that engines need no room for them."""
    rows = {
        sum(fit.taken) / tokens: tuple(
            threshold if taken else NOBODY
            for threshold, taken in zip(fit.thresholds, fit.taken[1:], strict=True)
        )
        for fit in fits
    }
    budgets = sorted(rows)
    return DepthTable(
        budgets=tuple(budgets), thresholds=tuple(rows[b] for b in budgets), tokens=tokens
    )
