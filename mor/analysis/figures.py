"""One figure per analysis, in the style of :mod:`mor.analysis.style`: rows in, a Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mor.analysis.style import (
    COLOURS,
    INK,
    PALE,
    SMALL,
    SOFT,
    intervals,
    legend,
    name_lines,
    name_panel,
    new_axes,
    series,
    short_numbers,
)

Rows = Sequence[dict[str, Any]]
BARS: Any = dict(color=PALE, edgecolor=COLOURS[0], linewidth=0.8)
BESIDE: tuple[Any, ...] = (  # bars beside each other or stacked
    dict(color=COLOURS[2], edgecolor=COLOURS[0], linewidth=0.8),
    dict(color="#ffffff", edgecolor=COLOURS[0], linewidth=0.8, hatch="////"),
    dict(color="#ffffff", edgecolor=COLOURS[0], linewidth=0.8),
)


def _curve(axes: Axes, rows: Rows, x: str, y: str, **look: Any) -> Line2D:
    """A line through the rows that have both."""
    known = [(r[x], r[y]) for r in rows if r.get(x) is not None and r.get(y) is not None]
    return axes.plot(*zip(*known, strict=True), **look)[0]


def _without_marker(i: int) -> dict[str, Any]:
    return series(i) | {"marker": None}


def _recursion_ticks(axes: Axes, rows: Rows) -> None:
    axes.set_xticks(range(len(rows)), [f"recursion {r['recursion']}" for r in rows])
    axes.grid(axis="x", visible=False)


def loss_curve(metrics: Rows) -> Figure:
    """Training and validation loss over tokens seen, from metrics.jsonl."""
    figure, (axes,) = new_axes("Loss over training tokens")
    names = {"loss": "training", "validation_nll": "validation\n(causal)"}
    looks = (dict(color=PALE, linewidth=1.1), series(0))
    drawn = [
        (_curve(axes, metrics, "tokens", y, **look), name)
        for (y, name), look in zip(names.items(), looks, strict=True)
        if any(m.get(y) is not None for m in metrics)
    ]
    axes.set(xlabel="training tokens", ylabel="loss, nats per token")
    short_numbers(axes.xaxis)
    name_lines(axes, *zip(*drawn, strict=True))
    return figure


def loss_over_flops(
    curves: Mapping[str, Sequence[tuple[float, float]]], title: str = "Loss at equal training FLOPs"
) -> Figure:
    """Validation bits per byte of several models, (FLOPs, bits per byte) each, from a quarter of
    the budget on: before that all of them fall steeply."""
    figure, (axes,) = new_axes(title)
    most = max(flops for points in curves.values() for flops, _ in points)
    lines = []
    for i, points in enumerate(curves.values()):
        late = [p for p in points if p[0] >= 0.2 * most] or points
        lines += axes.plot(*zip(*late, strict=True), **series(i))
    axes.set(xlabel="training FLOPs", ylabel="validation bits per byte (causal)")
    short_numbers(axes.xaxis)
    name_lines(axes, lines, list(curves))
    return figure


def router_health(metrics: Rows) -> Figure:
    """Share of tokens in each recursion, and the router's health, over training steps."""
    figure, (left, right) = new_axes(
        "Tokens in each recursion, and the health of the router", 9.6, 3.6, 2
    )
    rows = [m for m in metrics if m.get("share_per_recursion")]
    steps = [m["step"] for m in rows]
    shares = zip(*(m["share_per_recursion"] for m in rows), strict=True)
    drawn = [left.plot(steps, y, **_without_marker(r))[0] for r, y in enumerate(shares)]
    left.set(xlabel="training step", ylabel="share of tokens", ylim=(0, 1.05))
    name_lines(left, drawn, [f"recursion {r + 1}" for r in range(len(drawn))])
    names = {
        "depth_entropy": "depth entropy,\n1 = even",
        "agreement": "agreement\nwith top-k",
        "dead_positions": "dead positions",
        "max_violation": "largest overload\n(MaxVio)",
    }
    known = [name for name in names if any(m.get(name) is not None for m in rows)]
    drawn = [_curve(right, rows, "step", y, **_without_marker(i)) for i, y in enumerate(known)]
    right.set(xlabel="training step", ylabel="share")
    name_lines(right, drawn, [names[name] for name in known])
    return figure


def depth_histogram(rows: Rows) -> Figure:
    figure, (axes,) = new_axes("Share of tokens by depth")
    bars = axes.bar([str(r["depth"]) for r in rows], [r["share"] for r in rows], **BARS)
    axes.bar_label(bars, [f"{r['share']:.1%}" for r in rows], padding=2)
    axes.set(xlabel="depth, recursions", ylabel="share of tokens")
    axes.margins(y=0.12)
    axes.grid(axis="x", visible=False)
    return figure


def dead_tokens(rows: Rows) -> Figure:
    figure, (axes,) = new_axes("Share that never takes a recursion")
    names = {"dead_positions": "positions", "dead_types": "distinct tokens"}
    for i, (name, label) in enumerate(names.items()):
        places = np.arange(len(rows)) + (i - 0.5) * 0.38
        bars = axes.bar(places, [r[name] or 0 for r in rows], 0.36, label=label, **BESIDE[i])
        said = ["–" if r[name] is None else f"{r[name]:.1%}" for r in rows]
        axes.bar_label(bars, said, padding=2, fontsize=SMALL)
    _recursion_ticks(axes, rows)
    axes.set_ylim(0, max(0.05, axes.get_ylim()[1] * 1.15))
    axes.set_ylabel("share that never took it")
    legend(axes)
    return figure


def depth_predictors(rows: Rows) -> Figure:
    figure, (axes,) = new_axes("How well simple rules predict the depth")
    values = [r["explained"] for r in rows]
    axes.barh([r["predictor"] for r in rows], values, 0.6, **BARS)
    for place, value in enumerate(values):
        axes.text(max(value, 0) + 0.02, place, f"{value:.1%}", va="center")
    axes.invert_yaxis()
    axes.set_xlim(min(0, *values) - 0.02, 1.15)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the depth's variance explained\n(on windows not used for the table)")
    return figure


def agreement(rows: Rows) -> Figure:
    figure, (axes,) = new_axes("Agreement of threshold and top-k selection")
    names = {
        "same_decision": "same decision",
        "share_threshold": "taken by threshold",
        "share_topk_non_causal": "taken by top-k (non-causal)",
    }
    for i, (name, label) in enumerate(names.items()):
        places = np.arange(len(rows)) + (i - 1) * 0.27
        bars = axes.bar(places, [r[name] for r in rows], 0.25, label=label, **BESIDE[i])
        axes.bar_label(bars, [f"{r[name]:.1%}" for r in rows], padding=2, fontsize=SMALL)
    _recursion_ticks(axes, rows)
    axes.set(ylabel="share of the candidates", ylim=(0, 1.1))
    legend(axes)
    return figure


def score_histogram(rows: Rows) -> Figure:
    """For each recursion: how many tokens have which score, those taken below those not taken."""
    recursions = sorted({r["recursion"] for r in rows})
    figure, panels = new_axes(
        "Distribution of router scores", max(6.4, 3.2 * len(recursions)), 3.4, len(recursions)
    )
    for axes, recursion in zip(panels, recursions, strict=True):
        own = [r for r in rows if r["recursion"] == recursion]
        total, below = sum(r["tokens"] for r in own) or 1, np.zeros(len(own) // 2)
        for i, chosen in enumerate((True, False)):
            part = [r for r in own if r["taken"] == chosen]
            heights = np.array([r["tokens"] / total for r in part])
            look = BESIDE[i] | dict(align="edge", label="not taken" if i else "taken")
            width = part[0]["high"] - part[0]["low"]
            axes.bar([r["low"] for r in part], heights, width, below, **look)
            below = below + heights
        name_panel(axes, f"recursion {recursion}")
        axes.set_xlabel("router score")
    panels[0].set_ylabel("share of scored tokens")
    panels[-1].legend(loc="upper center", frameon=False, fontsize=SMALL)
    return figure


def drift(rows: Rows) -> Figure:
    """Cosines as a matrix; relative change of consecutive stages as bars."""
    figure, (left, right) = new_axes("How states change between recursions", 8.8, 3.6, 2)
    before, after = (sorted({r[stage] for r in rows}) for stage in ("earlier", "later"))
    matrix = np.full((len(before), len(after)), np.nan)
    for r in rows:
        place = after.index(r["later"]), before.index(r["earlier"])
        matrix[place[::-1]] = r["cosine"]
        shade = "#ffffff" if r["cosine"] > 0.6 else INK
        left.text(*place, f"{r['cosine']:.2f}", color=shade, ha="center", va="center")
    left.imshow(matrix, cmap="Blues", vmin=-0.2, vmax=1.2)
    left.set_xticks(range(len(after)), after)
    left.set_yticks(range(len(before)), before)
    left.grid(visible=False)
    name_panel(left, "cosine between states")
    left.set(xlabel="after recursion", ylabel="and after recursion (0: before the first)")
    steps = [r for r in rows if r["later"] == r["earlier"] + 1]
    names = [f"{r['earlier']}→{r['later']}" for r in steps]
    bars = right.bar(names, [r["relative_change"] for r in steps], **BARS)
    right.bar_label(bars, fmt="%.2f", padding=2)
    right.margins(y=0.12)
    right.grid(axis="x", visible=False)
    name_panel(right, "length of the change over length of the state")
    right.set_xlabel("recursion")
    return figure


def kv_similarity(rows: Rows) -> Figure:
    figure, panels = new_axes(
        "Similarity of keys and values between recursions", 8.8, 3.4, 2, sharey=True
    )
    pairs = sorted({(r["earlier"], r["later"]) for r in rows})
    for axes, kind in zip(panels, ("keys", "values"), strict=True):
        drawn = []
        for i, pair in enumerate(pairs):
            own = [r for r in rows if (r["earlier"], r["later"]) == pair]
            drawn.append(_curve(axes, own, "layer", f"cosine_{kind}", **series(i)))
        axes.set_xticks(sorted({r["layer"] for r in rows}))
        name_panel(axes, kind)
        axes.set(xlabel="shared layer", ylim=(min(0, axes.get_ylim()[0]), 1.05))
        name_lines(axes, drawn, [f"recursions\n{a} and {b}" for a, b in pairs])
    panels[0].set_ylabel("mean cosine")
    return figure


def depth_scaling(rows: Rows) -> Figure:
    figure, (axes,) = new_axes("Loss by the largest depth allowed")
    trained = [r for r in rows if not r["extrapolated"]]
    further = [trained[-1], *(r for r in rows if r["extrapolated"])]
    drawn, names = [], []
    if len(further) > 1:
        look = series(1) | dict(markerfacecolor="#ffffff")
        drawn.append(_curve(axes, further, "max_depth", "nll", **look))
        names.append("beyond\ntraining")
    drawn.append(_curve(axes, trained, "max_depth", "nll", **series(0)))
    names.append("trained\ndepths")
    for r in rows:
        axes.annotate(
            f"{r['mean_depth']:.2f}",
            (r["max_depth"], r["nll"]),
            (5, 5),
            textcoords="offset points",
            fontsize=SMALL,
            color=SOFT,
        )
    axes.set_xticks([r["max_depth"] for r in rows])
    axes.margins(y=0.18)
    axes.set_xlabel("largest depth allowed, recursions (numbers: mean depth)")
    axes.set_ylabel("NLL, nats per token (causal)")
    name_lines(axes, drawn, names)
    return figure


def depth_curve(rows: Rows) -> Figure:
    """Loss against mean depth spent, and against the time of a token. "full", which is no budget,
    stands beside the line."""
    figure, panels = new_axes("Loss by depth budget", 8.8, 3.6, 2, sharey=True)
    budgets = [r for r in rows if r["depth"] != "full"]
    full = [r for r in rows if r["depth"] == "full"]
    names = {
        "mean_depth": "mean depth spent, recursions\n(numbers: budgets asked for)",
        "microseconds_per_token": "time, microseconds per token read",
    }
    for axes, (name, label) in zip(panels, names.items(), strict=True):
        for i, part in enumerate((budgets, full)):
            look = series(i) | ({} if i == 0 else dict(linestyle="", markerfacecolor="#ffffff"))
            if part:
                _curve(axes, part, name, "nll", label=("budgets", "full depth")[i], **look)
        for r in rows:
            said = r["depth"] if isinstance(r["depth"], str) else f"{r['depth']:g}"
            place = (5, 5) if r in budgets else (5, -11)
            axes.annotate(
                said,
                (r[name], r["nll"]),
                place,
                textcoords="offset points",
                fontsize=SMALL,
                color=SOFT,
            )
        axes.margins(x=0.1, y=0.15)
        axes.set_xlabel(label)
    panels[0].set_ylabel("NLL, nats per token (causal)")
    panels[1].legend(frameon=False, fontsize=SMALL)
    return figure


def depth_by_class(rows: Rows) -> Figure:
    figure, (axes,) = new_axes("Mean depth by class of token", 6.4, 0.24 * len(rows) + 1.4)
    y, names, place = [], [], 0.0
    for i, row in enumerate(rows):
        place += 0.7 if i and row["by"] != rows[i - 1]["by"] else 0
        y.append(place)
        names.append(f"{row['group']}  (n = {row['count']:,})")
        place += 1
    intervals(axes, y, rows)
    axes.set_yticks(y, names)
    axes.invert_yaxis()
    axes.set_xlabel("mean depth, recursions (line: 95% interval)")
    return figure


def counterfactual_gains(rows: Rows) -> Figure:
    figure, (axes,) = new_axes(
        "Change of log-probability at another depth", 6.4, 0.32 * len(rows) + 1.5
    )
    y = list(range(len(rows)))
    intervals(axes, y, rows)
    axes.axvline(0, color=SOFT, linewidth=1)
    to = [r["depth"] + (1 if r["change"] == "more" else -1) for r in rows]
    names = [
        f"depth {r['depth']} → {d}  (n = {r['count']:,})" for r, d in zip(rows, to, strict=True)
    ]
    axes.set_yticks(y, names)
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.set_xlabel(
        "mean change of the target's log-probability, nats\n"
        "(right of 0: better; line: 95% interval)"
    )
    return figure
