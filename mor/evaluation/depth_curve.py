"""One model at several depth budgets: loss against what is spent, in recursions and in time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mor.data.stream import Windows
from mor.evaluation.nll import Evaluation, evaluate
from mor.model.budget import Depth, budget_of
from mor.model.transformer import Transformer

ROUNDS, TIMED_WINDOWS = 3, 16


@dataclass(frozen=True, kw_only=True)
class AtDepth:
    """depth: what was asked for."""

    depth: Depth
    found: Evaluation
    tokens_per_second: float

    def to_row(self) -> dict[str, Any]:
        """For tables and figures."""
        found = self.found
        return dict(
            depth=self.depth,
            mean_depth=found.mean_depth,
            nll=found.nll,
            bits_per_byte=found.bits_per_byte,
            deepest=found.max_depth,
            microseconds_per_token=1e6 / self.tokens_per_second,
            tokens=found.tokens,
        )


def depth_curve(
    model: Transformer,
    data: Windows,
    depths: Sequence[Depth],
    *,
    max_windows: int | None = None,
    **settings: Any,
) -> list[AtDepth]:
    """Loss, mean depth and time of reading the text at each of these depths, in their order.

    The time is that of reading whole windows, as :func:`~mor.evaluation.nll.evaluate` does, and not
    of decoding: the best of ``ROUNDS`` turns over a few windows, which all depths take one after
    the other. Settings as there. Raises ValueError for a depth that the model cannot have, before
    anything is measured.
    """
    for depth in depths:
        budget_of(model, depth)

    def read(depth: Depth, most: int | None) -> Evaluation:
        return evaluate(model, data, max_windows=most, depth=depth, **settings)

    found = [read(depth, max_windows) for depth in depths]
    speeds = [0.0] * len(depths)
    few = min(TIMED_WINDOWS, max_windows or TIMED_WINDOWS)
    for _ in range(ROUNDS):
        for i, depth in enumerate(depths):
            started = time.perf_counter()
            tokens = read(depth, few).tokens
            speeds[i] = max(speeds[i], tokens / (time.perf_counter() - started))
    return [
        AtDepth(depth=depth, found=each, tokens_per_second=speed)
        for depth, each, speed in zip(depths, found, speeds, strict=True)
    ]
