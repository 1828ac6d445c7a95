"""Figures of studies, in the style of :mod:`mor.analysis.style`: numbers in, a Figure out."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from mor.analysis.style import (
    COLOURS,
    SMALL,
    SOFT,
    literal,
    name_lines,
    name_panel,
    new_axes,
    new_figure,
    new_grid,
    readable,
    series,
    shades,
)
from mor.studies.compare import Line
from mor.studies.depth_report import DepthLine
from mor.studies.scaling import Optimum, Point, parabola

Runs = Mapping[str, Mapping[int, dict[str, Any]]]  # by row and seed
OVERLAID = 5  # lines that stay legible in one panel; more get a panel each
BAND = " (band: range of the seeds)"
HOPS = {
    "answers_right_by_hops": "share of right answers (causal)",
    "mean_depth_by_hops": "mean depth",
}


def rows_figure(
    lines: Sequence[Line],
    runs: Runs,
    *,
    title: str = "Validation loss by row",
    reference: str | None = None,
    controls: Sequence[str] = (),
) -> Figure:
    """Every seed of every row, best row first, and beside it the difference from the reference row
    with its 95% interval. controls: rows that stand apart, above the others."""
    ordered = sorted(lines, key=lambda line: (line.row not in controls, line.nll))
    places = [i + 0.6 * (line.row not in controls) for i, line in enumerate(ordered)]
    figure, (left, right) = new_axes(title, 9.6, 1.4 + 0.3 * len(lines), 2, sharey=True)
    for place, line in zip(places, ordered, strict=True):
        values = [run["validation_nll"] for run in runs[line.row].values()]
        left.plot(values, [place] * len(values), "o", color=COLOURS[2], alpha=0.7, markersize=5)
        left.plot(line.nll, place, "|", color=COLOURS[0], markersize=13, markeredgewidth=2)
        if line.difference is not None:
            if line.difference_low is not None and line.difference_high is not None:
                right.hlines(place, line.difference_low, line.difference_high, color=COLOURS[0])
            right.plot(line.difference, place, "o", color=COLOURS[0], markersize=5)
    left.set_yticks(places, [literal(line.row) for line in ordered])
    left.invert_yaxis()
    left.set_xlabel("validation NLL, nats (causal)\ndots: seeds; bar: their mean")
    right.axvline(0, color=SOFT, linewidth=1)
    against = "the reference" if reference is None else f"'{literal(reference)}'"
    right.set_xlabel(f"difference from {against}, nats (right: worse)\nline: 95% interval")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure


def hops_figure(
    lines: Sequence[Line],
    runs: Runs,
    *,
    title: str = "Right answers and depth by hops",
    compared: str | None = None,
) -> Figure | None:
    """Of a task: right answers and mean depth by the number of hops that a query asks for, with the
    range of the seeds. More than five rows get a panel each, in which the row ``compared`` is drawn
    in grey."""
    known = [
        x.row
        for x in lines
        if all(run.get("answers_right_by_hops") for run in runs[x.row].values())
    ]
    if not known:
        return None
    if len(known) > OVERLAID:
        return _hops_grid(known, runs, title, compared)
    figure, panels = new_axes(title, 9.6, 3.8, 2)
    for axes, (name, label) in zip(panels, HOPS.items(), strict=True):
        drawn = [_by_hops(axes, runs[row], name, **series(i)) for i, row in enumerate(known)]
        _hops_axes(axes, name)
        seeds = max(len(runs[row]) for row in known)
        axes.set(xlabel="hops asked for" + BAND * (seeds > 1), ylabel=label)
        name_lines(axes, drawn, [_wrapped(row) for row in known])
    return figure


def _hops_grid(known: Sequence[str], runs: Runs, title: str, compared: str | None) -> Figure:
    """Small multiples, at most five in a line: the depth of each row below its right answers."""
    lines = math.ceil(len(known) / OVERLAID)
    columns = math.ceil(len(known) / lines)
    figure = new_figure(title, 2 * columns + 0.6, 3.5 * lines + 0.4)
    grid = new_grid(figure, 2 * lines, columns, sharex=True, sharey="row")
    deepest = max(max(run["mean_depth_by_hops"][1:]) for row in known for run in runs[row].values())
    for i in range(lines * columns):
        pair = grid[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        if i >= len(known):
            for axes in pair:
                axes.set_visible(False)
            continue
        _answers_and_depth(pair, runs, known[i], compared if compared in known else None)
        pair[1].set_ylim(0.8, deepest + 0.2)
        pair[1].xaxis.set_tick_params(labelbottom=i + columns >= len(known))  # none below it
        if i % columns == 0:
            for axes, label in zip(pair, HOPS.values(), strict=True):
                axes.set_ylabel(label.replace(" (causal)", "\n(causal)"))
    grey = f"; dashed grey: {literal(compared)}" if compared and compared in known else ""
    figure.supxlabel(f"hops asked for{BAND}{grey}", fontsize=9)
    return figure


def _answers_and_depth(pair: NDArray[Any], runs: Runs, row: str, compared: str | None) -> None:
    for axes, name in zip(pair, HOPS, strict=True):
        if compared is not None and compared != row:
            _by_hops(axes, runs[compared], name, color="#9aa3ab", linestyle="--")
        _by_hops(axes, runs[row], name, color=COLOURS[0], marker="o", markersize=3)
        _hops_axes(axes, name)
    name_panel(pair[0], literal(_wrapped(row)), SMALL)


def _by_hops(axes: Axes, runs: Mapping[int, dict[str, Any]], name: str, **look: Any) -> Line2D:
    """The mean over seeds from one hop on, on a band from the lowest seed to the highest."""
    values = np.array([run[name] for run in runs.values()], float)
    values = values[:, 1:] if name == "mean_depth_by_hops" else values  # 0: nothing is asked
    hops = np.arange(1, values.shape[1] + 1)
    if len(values) > 1:
        low, high = values.min(0), values.max(0)
        axes.fill_between(hops, low, high, color=look["color"], alpha=0.15, linewidth=0)
    return axes.plot(hops, values.mean(0), **look)[0]


def _hops_axes(axes: Axes, name: str) -> None:
    if name == "answers_right_by_hops":
        axes.set_ylim(0, 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _wrapped(name: str, width: int = 20) -> str:
    """A long name on several lines."""
    return "\n".join(textwrap.wrap(name, width)) if len(name) > width else name


def depths_figure(lines: Sequence[DepthLine], *, title: str = "Loss over depth") -> Figure:
    """NLL over the mean depth that is spent, a line for each row; rows with one depth are dots."""
    rows = dict.fromkeys(line.row for line in lines)
    figure, (axes,) = new_axes(title, 9.6, max(4.0, 1.2 + 0.26 * len(rows)), 1)
    drawn = []
    for i, row in enumerate(rows):
        mine = [line for line in lines if line.row == row and line.depth not in ("full", "best")]
        mine = mine or [line for line in lines if line.row == row and line.depth == "full"]
        look = series(i) | {"markersize": 3.5}
        spent = [line.mean_depth for line in mine]
        drawn.append(axes.plot(spent, [line.nll for line in mine], **look)[0])
    axes.set(yscale="log", ylabel="validation NLL, nats (causal)")
    axes.set_xlabel("mean depth spent, recursions per token")
    readable(axes.yaxis)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    name_lines(axes, drawn, list(rows))
    return figure


def isoflop_figure(
    points: Sequence[Point],
    optima: Sequence[Optimum],
    *,
    size_name: str,
    title: str = "Loss over size at equal budgets",
) -> Figure:
    """A panel for each family: measured losses over size, the parabola of each budget, its lowest
    point, marked otherwise where it lies beyond the sizes measured."""
    families = list(dict.fromkeys(p.family for p in points))
    budgets = sorted({p.budget for p in points})
    columns = min(3, len(families))
    rows = math.ceil(len(families) / columns)
    figure = new_figure(title, 3.6 * columns + 0.4, 3.1 * rows + 0.6)
    grid = new_grid(figure, rows, columns, sharex=True, sharey=True)
    sizes = [p.size for p in points]
    grid[0, 0].set(xscale="log", xlim=(min(sizes) / 1.25, max(sizes) * 1.25))
    drawn: dict[Axes, list[tuple[Line2D, str]]] = {}
    for axes, family in zip(grid.flat, families, strict=False):
        drawn[axes] = []
        for colour, budget in zip(shades(len(budgets)), budgets, strict=True):
            chosen = [p for p in points if (p.family, p.budget) == (family, budget)]
            if chosen:
                drawn[axes].append((_isoflop_curve(axes, chosen, colour), f"{budget:.2g}"))
        for best in (o for o in optima if o.family == family and math.isfinite(o.size)):
            _lowest_point(axes, best, shades(len(budgets))[budgets.index(best.budget)])
        name_panel(axes, literal(family))
        readable(axes.xaxis)
    for axes, lines in drawn.items():  # now that the limits, which all share, are final
        name_lines(axes, *zip(*lines, strict=True), at_edge=False)
    for axes in grid.flat[len(families) :]:
        axes.set_visible(False)
    for j in range(columns):  # the lowest panel of each column, which may have none below it
        grid.flat[len(families) - columns + j].xaxis.set_tick_params(labelbottom=True)
    figure.supylabel("validation NLL, nats (causal)", fontsize=9)
    figure.supxlabel(
        f"{size_name}\nat the lines: training FLOPs; star: lowest point of the parabola; "
        "hollow star or arrow: it lies beyond the sizes measured",
        fontsize=9,
    )
    return figure


def _isoflop_curve(axes: Axes, chosen: Sequence[Point], colour: Any) -> Line2D:
    """Dots, and a parabola through them if there are three sizes."""
    ordered = sorted(chosen, key=lambda p: p.size)
    sizes, losses = [p.size for p in ordered], [p.nll for p in ordered]
    (dots,) = axes.plot(sizes, losses, "o", color=colour, markersize=3.5, alpha=0.8)
    if len(set(sizes)) < 3:
        return dots
    log_size = np.linspace(math.log(sizes[0]), math.log(sizes[-1]), 100)
    return axes.plot(np.exp(log_size), np.polyval(parabola(ordered), log_size), color=colour)[0]


def _lowest_point(axes: Axes, best: Optimum, colour: Any) -> None:
    look: Any = dict(markerfacecolor=colour, markeredgecolor="#000000", zorder=3, clip_on=False)
    if best.inside:
        axes.plot(best.size, best.nll, "*", markersize=13, **look)
        return
    low, high = axes.get_xlim()
    edge, marker = (low, "<") if best.size < low else (high, ">")
    if low <= best.size <= high:  # beyond the sizes measured, and not beyond the axis
        edge, marker = best.size, "*"
        look["markerfacecolor"] = "#ffffff"
    axes.plot(edge, best.nll, marker, markersize=8, **look)


def paths_figure(
    optima: Sequence[Optimum],
    *,
    size_name: str,
    title: str = "Best size and tokens over the budget",
) -> Figure:
    """Best size and best number of tokens over the budget, with intervals; a cross where there is
    none. Families stand a little beside each other, so that their intervals do not overlap."""
    figure, panels = new_axes(title, 9.6, 4, 2)
    families = list(dict.fromkeys(o.family for o in optima))
    budgets = sorted({o.budget for o in optima})
    nearest = min((b / a for a, b in pairwise(budgets)), default=2.0)
    beside = nearest ** (0.4 * (np.arange(len(families)) / max(1, len(families) - 1) - 0.5))
    labels = {"size": f"best {size_name}", "tokens": "best number of training tokens"}
    for axes, (what, label) in zip(panels, labels.items(), strict=True):
        drawn = []
        for i, family in enumerate(families):
            mine = [o for o in optima if o.family == family and math.isfinite(o.size)]
            if mine:
                drawn.append((_path(axes, mine, what, beside[i], i), _wrapped(family)))
        axes.set(xscale="log", yscale="log", xlabel="training budget, FLOPs", ylabel=label)
        axes.set_ylim(*_reach([getattr(o, what) for o in optima if math.isfinite(o.size)]))
        readable(axes.yaxis)
        axes.set_xticks(budgets, [f"{b:.2g}" for b in budgets])
        axes.xaxis.set_minor_locator(NullLocator())
        if drawn:
            name_lines(axes, *zip(*drawn, strict=True))
    none = any(math.isnan(o.size_low + o.size_high) for o in optima)
    note = "line: 95% interval, cut off at the edge of the panel"
    figure.supxlabel(note + ("; cross: no interval" if none else ""), fontsize=SMALL, color=SOFT)
    return figure


def _path(axes: Axes, mine: Sequence[Optimum], what: str, beside: float, i: int) -> Line2D:
    at = np.array([o.budget for o in mine]) * beside
    low, best, high = (
        np.array([getattr(o, what + end) for o in mine]) for end in ("_low", "", "_high")
    )
    loose = np.isnan(low + high)
    axes.vlines(at[~loose], low[~loose], high[~loose], color=COLOURS[i % 6], linewidth=1.2)
    axes.plot(at[loose], best[loose], "x", color=COLOURS[i % 6], markersize=10, zorder=3)
    return axes.plot(at, best, **series(i))[0]


def _reach(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis around measured values, whatever their intervals are."""
    return (min(values, default=1.0) / 2.5, max(values, default=1.0) * 2.5)
