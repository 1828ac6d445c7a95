"""The log of a run: numbers by step, to its metrics file and to a tracker."""

from __future__ import annotations

import math
from typing import Any

from mor.run_folder import RunFolder
from mor.training.trackers import NoTracker, Tracker, flat_scalars


class MetricsLog:
    """Continues a run's metrics after ``step``; later rows are dropped, for they come again.

    active: False writes nothing, for all ranks but the first. tracker: gets the numbers as well.
    """

    def __init__(
        self, run: RunFolder, *, step: int, active: bool = True, tracker: Tracker | None = None
    ) -> None:
        self.run, self.active, self.tracker = run, active, tracker or NoTracker()
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
        self.run.add_metrics({"step": step} | finite)
        self.tracker.scalars(step, flat_scalars(values))
