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


@dataclass(frozen=True, kw_only=True)
class AtDepth:
    """depth: what was asked for. seconds: that reading the text took."""

    depth: Depth
    found: Evaluation
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.found.tokens / self.seconds

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
    of decoding. Settings as there. Raises ValueError for a depth that the model cannot have, before
    anything is measured.
    """
    for depth in depths:
        budget_of(model, depth)
    evaluate(model, data, max_windows=1, depth=depths[0], **settings)  # what starts once
    curve = []
    for depth in depths:
        started = time.perf_counter()
        found = evaluate(model, data, max_windows=max_windows, depth=depth, **settings)
        curve.append(AtDepth(depth=depth, found=found, seconds=time.perf_counter() - started))
    return curve
