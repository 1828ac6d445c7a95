"""Where a run's numbers go: metrics.jsonl, and one line of progress for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mor.model.packing import tally
from mor.model.routing import (
    ExpertChoiceRouter,
    FixedDepthRouter,
    Router,
    Routing,
    TokenChoiceRouter,
)
from mor.training.distributed import ALONE, Ranks
from mor.training.trackers import NoTracker, Tracker, flat_scalars


class MetricsLog:
    """Appends one JSON object per line; ``truncate_to`` drops what a continued run will write
    again."""

    def __init__(
        self,
        path: Path,
        *,
        truncate_to: int | None = None,
        active: bool = True,
        tracker: Tracker | None = None,
    ) -> None:
        """active: False writes nothing, for all ranks but the first. tracker: gets the numbers as
        well."""
        self.path, self.active, self.tracker = path, active, tracker or NoTracker()
        if not active:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = read_metrics(path) if truncate_to is not None and path.is_file() else []
        unfinished = path.with_name(f".{path.name}.tmp")
        unfinished.write_text(
            "".join(json.dumps(row) + "\n" for row in kept if row["step"] <= (truncate_to or 0))
        )
        unfinished.replace(path)

    def write(self, *, step: int, **values: Any) -> None:
        """NaN and infinity, which JSON has not, become null."""
        if not self.active:
            return
        finite = {
            n: None if isinstance(v, float) and not math.isfinite(v) else v
            for n, v in values.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | finite) + "\n")
        self.tracker.scalars(step, flat_scalars(values))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut off by a crash is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


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


class ProgressLine:
    """A live line on a terminal; elsewhere a plain line now and then."""

    def __init__(self, console: Console, total: int, done: int, label: str) -> None:
        self.console, self.label, self.total = console, label, total
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(label, total=total, completed=done, text="")

    def __enter__(self) -> ProgressLine:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def update(self, step: int, text: str) -> None:
        self.bar.update(self.task, completed=step, text=text)

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, soft_wrap=True)
