"""Optional trackers: where a run's metrics and histograms of its routing go besides its folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from mor.accessories import accessory
from mor.files import extra
from mor.model.routing import Routing


class Tracker(Protocol):
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None: ...

    def close(self) -> None: ...


class Tolerant:
    """A tracker that may fail: the first failure is a warning, and training goes on without it."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.broken = tracker, set[str]()

    def _accessory(self) -> AbstractContextManager[None]:
        if self.broken:
            self.tracker = NoTracker()
        return accessory("the tracker gets nothing more", self.broken)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with self._accessory():
            self.tracker.scalars(step, values)

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        with self._accessory():
            self.tracker.histograms(step, values)

    def close(self) -> None:
        with self._accessory():
            self.tracker.close()


class TensorBoard:
    """Event files in the run directory: ``tensorboard --logdir runs``."""

    def __init__(self, out: Path, config: Mapping[str, Any], first_step: int) -> None:
        with _needs("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            self.writer.add_histogram(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Logged:
    """Weights & Biases, and trackio, which has the same interface. A resumed run keeps its name."""

    def __init__(
        self, library: ModuleType, out: Path, config: Mapping[str, Any], **settings: Any
    ) -> None:
        self.library = library
        library.init(project="mor", config=dict(config), resume="allow", **settings)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.library.log(dict(values), step=step)

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        self.library.log(
            {name: self.library.Histogram(value) for name, value in values.items()}, step=step
        )

    def close(self) -> None:
        self.library.finish()


def _wandb(out: Path, config: Mapping[str, Any], first_step: int) -> Tracker:
    with _needs("wandb"):
        import wandb
    name = _run_name(out)
    return Logged(wandb, out, config, name=name, id=name, dir=str(out))


def _trackio(out: Path, config: Mapping[str, Any], first_step: int) -> Tracker:
    with _needs("trackio"):
        import trackio
    return Logged(trackio, out, config, name=_run_name(out))


def _run_name(out: Path) -> str:
    return "-".join(part for part in out.parts if part != out.anchor)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "none": lambda out, config, first_step: NoTracker(),
    "tensorboard": TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _needs(name: str) -> AbstractContextManager[None]:
    return extra("track", needed_for=f"tracker={name!r}")


def flat_scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among ``values``; a list becomes one number per recursion."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            found |= {f"{name}/{i}": float(v) for i, v in enumerate(value, start=1)}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return {name: value for name, value in found.items() if math.isfinite(value)}


@torch.no_grad()
def routing_histograms(routings: Sequence[Routing]) -> dict[str, np.ndarray]:
    """Depths of tokens and router logits at each recursion, over a step's forwards on this rank."""
    found = {"routing/depth": torch.cat([r.depth for r in routings])}
    for recursion in range(len(routings[0].steps)):
        logits = [r.steps[recursion].decision.logit for r in routings]
        given = [logit for logit in logits if logit is not None]
        if given:
            found[f"routing/logit/{recursion + 1}"] = torch.cat(given).float()
    return {name: values.cpu().numpy() for name, values in found.items()}
