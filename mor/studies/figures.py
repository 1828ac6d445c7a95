"""Figures of studies, in the style of :mod:`mor.analysis.figures`: numbers in, a matplotlib Figure
out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from mor.analysis.figures import GREYS, literal, new_axes, series
from mor.studies.compare import Line
from mor.studies.scaling import Optimum, Point, parabola

Runs = Mapping[str, Mapping[int, dict[str, Any]]]  # by row and seed


def _readable(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, as 200M or 2B and not as 2 x 10^8."""
    number = EngFormatter(sep="")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: number(value).replace("G", "B"))


def rows_figure(lines: Sequence[Line], runs: Runs) -> Figure:
    """Every seed of every row, and beside it the difference from the reference with its
    interval."""
    figure, (left, right) = new_axes(9, 1.2 + 0.38 * len(lines), 2, share_y=True)
    for place, line in enumerate(lines):
        values = [run["validation_nll"] for run in runs[line.row].values()]
        left.plot(values, [place] * len(values), "o", color=GREYS[1], alpha=0.6, markersize=5)
        left.plot([line.nll], [place], "|", color=GREYS[0], markersize=15, markeredgewidth=2)
        if line.difference is not None:
            if line.difference_low is not None and line.difference_high is not None:
                right.plot(
                    [line.difference_low, line.difference_high], [place] * 2, "-", color=GREYS[0]
                )
            right.plot([line.difference], [place], "s", color=GREYS[0], markersize=5)
    left.set_yticks(range(len(lines)), [literal(line.row) for line in lines])
    left.invert_yaxis()
    left.set_xlabel("validation NLL, nats (causal)\nbar: mean")
    right.axvline(0, color=GREYS[3], linestyle=":")
    right.set_xlabel("difference from the reference, nats\nline: 95% interval")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure


def hops_figure(lines: Sequence[Line], runs: Runs) -> Figure | None:
    """Of a task: right answers and mean depth by the number of hops that a query asks for."""
    known = [
        x.row
        for x in lines
        if all(run.get("answers_right_by_hops") for run in runs[x.row].values())
    ]
    if not known:
        return None
    figure, (left, right) = new_axes(10, 4.2, 2)
    drawn = []
    for i, row in enumerate(known):
        answers, depth = (
            _mean_of(runs[row], name) for name in ("answers_right_by_hops", "mean_depth_by_hops")
        )
        drawn += left.plot(range(1, len(answers) + 1), answers, **series(i))
        right.plot(range(len(depth)), depth, **series(i))
    left.set(xlabel="hops asked for", ylabel="share of right answers (causal)", ylim=(0, 1.02))
    without = " (0: tokens that ask for nothing)" if np.isfinite(depth[0]) else ""
    right.set(xlabel="hops asked for" + without, ylabel="mean depth, recursions")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # given outright: matplotlib by itself leaves out those that begin with _
    names = [literal(row) for row in known]
    figure.legend(drawn, names, frameon=False, fontsize=8, loc="outside right upper")
    return figure


def _mean_of(runs: Mapping[int, dict[str, Any]], name: str) -> np.ndarray:
    return np.mean(np.array([run[name] for run in runs.values()], float), 0)


def isoflop_figure(points: Sequence[Point], optima: Sequence[Optimum], *, size_name: str) -> Figure:
    """A panel for each family: measured losses over size, the parabola of each budget, its lowest
    point."""
    families, budgets = (
        list(dict.fromkeys(p.family for p in points)),
        sorted({p.budget for p in points}),
    )
    figure, panels = new_axes(4.2 * len(families), 4.2, len(families), share_y=True)
    for axes, family in zip(panels, families, strict=True):
        for i, budget in enumerate(budgets):
            chosen = [p for p in points if (p.family, p.budget) == (family, budget)]
            if chosen:
                _isoflop_curve(axes, chosen, f"{budget:.3g} FLOPs", series(i))
        for best in (o for o in optima if o.family == family and math.isfinite(o.size)):
            face = "gold" if best.inside else "none"
            axes.plot(
                [best.size],
                [best.nll],
                "*",
                markersize=14,
                markeredgecolor="black",
                markerfacecolor=face,
            )
        axes.set(xscale="log", xlabel=size_name, title=literal(family))
        _readable(axes.xaxis)
    panels[0].set_ylabel("validation NLL, nats")
    panels[-1].legend(
        frameon=False,
        fontsize=9,
        title="star: lowest point (hollow: outside the sizes)",
        title_fontsize=8,
    )
    return figure


def _isoflop_curve(axes: Axes, chosen: Sequence[Point], label: str, look: dict[str, Any]) -> None:
    axes.plot(
        [p.size for p in chosen],
        [p.nll for p in chosen],
        **(look | {"linestyle": "none"}),
        label=label,
    )
    if len({p.size for p in chosen}) >= 3:
        log_size = np.log([p.size for p in chosen])
        fine = np.linspace(log_size.min(), log_size.max(), 100)
        axes.plot(np.exp(fine), np.polyval(parabola(chosen), fine), **(look | {"marker": None}))


def paths_figure(optima: Sequence[Optimum], *, size_name: str) -> Figure:
    """Best size and best number of tokens over the budget, with intervals; a cross where there is
    none."""
    figure, panels = new_axes(9, 4, 2)
    families = list(dict.fromkeys(o.family for o in optima))
    for axes, what, label in zip(
        panels, ("size", "tokens"), (size_name, "training tokens"), strict=True
    ):
        drawn = []
        for i, family in enumerate(families):
            mine = [o for o in optima if o.family == family and math.isfinite(o.size)]
            low, best, high = (
                np.array([getattr(o, what + end) for o in mine]) for end in ("_low", "", "_high")
            )
            error = np.nan_to_num(np.stack([best - low, high - best])).clip(min=0)
            drawn.append(
                axes.errorbar([o.budget for o in mine], best, yerr=error, **series(i), capsize=3)
            )
            loose = np.isnan(low + high)
            axes.plot(
                np.array([o.budget for o in mine])[loose],
                best[loose],
                "x",
                color="black",
                markersize=11,
            )
        axes.set(
            xscale="log", yscale="log", xlabel="training budget, FLOPs", ylabel=f"best {label}"
        )
        _readable(axes.yaxis)
        axes.set_xticks(
            sorted({o.budget for o in optima}),
            [f"{b:.3g}" for b in sorted({o.budget for o in optima})],
        )
        axes.xaxis.set_minor_locator(NullLocator())
        title = (
            "cross: no interval"
            if any(math.isnan(o.size_low + o.size_high) for o in optima)
            else None
        )
        axes.legend(
            drawn,
            [literal(family) for family in families],
            frameon=False,
            title=title,
            title_fontsize=8,
        )
    return figure
