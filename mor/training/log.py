"""The log of a run: numbers by step, to its metrics file, to a tracker, and in a few words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mor.accessories import accessory
from mor.run_folder import RunFolder
from mor.training.trackers import NoTracker, Tracker, flat_scalars


class MetricsLog:
    """Continues a run's metrics after ``step``, without the rows that a resumed run writes again.

    active: False writes nothing, for all ranks but the first. tracker: gets the numbers as well.
    """

    def __init__(
        self, run: RunFolder, *, step: int, active: bool = True, tracker: Tracker | None = None
    ) -> None:
        self.run, self.active, self.tracker = run, active, tracker or NoTracker()
        self.broken: set[str] = set()
        if active:
            run.keep_metrics(up_to=step)

    def write(self, *, step: int, **values: Any) -> None:
        """NaN and infinity, which JSON does not have, become null."""
        if not self.active:
            return
        finite = {
            n: None if isinstance(v, float) and not math.isfinite(v) else v
            for n, v in values.items()
        }
        with accessory(f"{self.run.metrics} lacks rows", self.broken):
            self.run.add_metrics({"step": step} | finite)
        self.tracker.scalars(step, flat_scalars(values))


@dataclass(frozen=True)
class Speed:
    """Of a step, on all ranks. mfu: the share of what the devices can do in bfloat16 that the model
    needs, None where that is not known; what is computed twice does not count twice."""

    tokens_per_s: float
    mfu: float | None = None

    @classmethod
    def of(
        cls, tokens: int, flops: float, elapsed_s: float, devices: int, peak: float | None
    ) -> Speed:
        """tokens and flops: of all devices. peak: FLOP/s of one, if known."""
        return cls(tokens / elapsed_s, flops / elapsed_s / (devices * peak) if peak else None)

    @property
    def known(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def in_words(self) -> str:
        mfu = "" if self.mfu is None else f" · MFU {100 * self.mfu:.1f}%"
        return f"{self.tokens_per_s:,.0f} tok/s{mfu}"


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
