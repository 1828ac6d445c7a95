"""Figures of studies: PNG and SVG, told apart by markers and dashes as well as by colour, so that grey is enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from mor.studies.compare import Line
from mor.studies.scaling import Optimum, Point

STYLES = (("#1b3a6b", "o", "-"), ("#b5532a", "s", "--"), ("#3f7d4f", "^", "-."), ("#7a5ca8", "D", ":"))


def _new(width: float, height: float, columns: int, *, share_y: bool = True) -> tuple[Any, Any]:
    """A figure and its axes, side by side."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (width, height)
    figure, axes = pyplot.subplots(1, columns, figsize=size, sharey=share_y, squeeze=False, layout="constrained")
    return figure, axes[0]


def save(figure: Any, folder: Path, name: str) -> None:
    """``name``.png and ``name``.svg."""
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{name}.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else None)
    pyplot.close(figure)


def _readable(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, as 200M and not as 2 x 10^8."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(EngFormatter(sep=""))


def draw_rows(lines: Sequence[Line], runs: Sequence[dict[str, Any]], names: Sequence[str], folder: Path) -> None:
    """Every seed of every row, and beside it the difference from the reference with its interval."""
    figure, axes = _new(9, 1.2 + 0.38 * len(lines), 2)
    (left, right), places = axes, range(len(lines))
    for place, line in enumerate(lines):
        values = [run["validation_nll"] for run, name in zip(runs, names, strict=True) if name == line.row]
        left.plot(values, [place] * len(values), "o", color="#1b3a6b", alpha=0.55, markersize=5)
        left.plot([line.nll], [place], "|", color="black", markersize=15, markeredgewidth=2)
        if line.difference is not None:
            bounds = (line.difference_low, line.difference_high)
            if None not in bounds:
                right.plot(bounds, [place] * 2, "-", color="black")
            right.plot([line.difference], [place], "s", color="#b5532a", markersize=6)
    left.set_yticks(list(places), [line.row for line in lines])
    left.invert_yaxis()
    left.set_xlabel("validation NLL, nats per token (causal); bar: mean")
    right.axvline(0, color="grey", linestyle=":")
    right.set_xlabel("difference from the reference, nats; line: 95% interval")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(6))
    save(figure, folder, "rows")


def draw_hops(lines: Sequence[Line], runs: Sequence[dict[str, Any]], names: Sequence[str], folder: Path) -> None:
    """Of a task: right answers and mean depth by the number of hops that a query asks for."""
    known = [(name, run) for name, run in zip(names, runs, strict=True) if run.get("answers_right_by_hops")]
    if not known:
        return
    figure, (left, right) = _new(10, 4.2, 2, share_y=False)
    for i, line in enumerate(lines):
        mine = [run for name, run in known if name == line.row]
        if not mine:
            continue
        color, marker, dash = STYLES[i % len(STYLES)]
        style = dict(color=color, marker=marker, linestyle=dash, alpha=1.0 if i < len(STYLES) else 0.5, label=line.row)
        right_answers = np.mean(np.array([run["answers_right_by_hops"] for run in mine], float), 0)
        left.plot(range(1, len(right_answers) + 1), right_answers, **style)
        depth = np.mean(np.array([run["mean_depth_by_hops"] for run in mine], float), 0)
        right.plot(range(len(depth)), depth, **style)
    left.set(xlabel="hops asked for", ylabel="share of right answers (causal)", ylim=(0, 1.02))
    right.set(xlabel="hops asked for (0: tokens that ask for nothing)", ylabel="mean depth, recursions")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
    save(figure, folder, "hops")


def draw_isoflop(points: Sequence[Point], optima: Sequence[Optimum], folder: Path, *, size_name: str) -> None:
    """A panel for each family: measured losses over size, the parabola of each budget, its lowest point."""
    families = list(dict.fromkeys(p.family for p in points))
    figure, axes = _new(4.2 * len(families), 4.2, len(families))
    budgets = sorted({p.budget for p in points})
    for axis, family in zip(axes, families, strict=True):
        for i, budget in enumerate(budgets):
            chosen = [p for p in points if (p.family, p.budget) == (family, budget)]
            if not chosen:
                continue
            color, marker, dash = STYLES[i % len(STYLES)]
            axis.plot(
                [p.size for p in chosen], [p.nll for p in chosen], marker, color=color, label=f"{budget:.3g} FLOPs"
            )
            _parabola(axis, chosen, color, dash)
        for best in optima:
            if best.family == family and math.isfinite(best.size):
                face = "gold" if best.inside else "none"
                axis.plot([best.size], [best.nll], "*", markersize=14, markeredgecolor="black", markerfacecolor=face)
        axis.set(xscale="log", xlabel=size_name, title=family)
        _readable(axis.xaxis)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation NLL, nats per token")
    axes[-1].legend(frameon=False, fontsize=9, title="star: lowest point (hollow: outside the sizes)", title_fontsize=8)
    save(figure, folder, "isoflop")


def _parabola(axis: Any, chosen: Sequence[Point], color: str, dash: str) -> None:
    if len({p.size for p in chosen}) < 3:
        return
    log_size = np.log([p.size for p in chosen])
    fine = np.linspace(log_size.min(), log_size.max(), 100)
    axis.plot(np.exp(fine), np.polyval(np.polyfit(log_size, [p.nll for p in chosen], 2), fine), dash, color=color)


def draw_paths(optima: Sequence[Optimum], folder: Path, *, size_name: str) -> None:
    """Best size and best number of tokens over the budget, with intervals."""
    figure, axes = _new(9, 4, 2, share_y=False)
    for axis, what, label in zip(axes, ("size", "tokens"), (size_name, "training tokens"), strict=True):
        for i, family in enumerate(dict.fromkeys(o.family for o in optima)):
            color, marker, dash = STYLES[i % len(STYLES)]
            mine = [o for o in optima if o.family == family and math.isfinite(o.size)]
            budget, best = [o.budget for o in mine], np.array([getattr(o, what) for o in mine])
            low, high = (np.array([getattr(o, f"{what}_{end}") for o in mine]) for end in ("low", "high"))
            error = np.nan_to_num(np.stack([best - low, high - best])).clip(min=0)
            axis.errorbar(budget, best, yerr=error, color=color, marker=marker, linestyle=dash, capsize=3, label=family)
        axis.set(xscale="log", yscale="log", xlabel="training budget, FLOPs", ylabel=f"best {label}")
        _readable(axis.yaxis)
        axis.set_xticks(sorted({o.budget for o in optima}), [f"{b:.3g}" for b in sorted({o.budget for o in optima})])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False)
    save(figure, folder, "optimal_paths")
