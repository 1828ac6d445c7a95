"""One figure for each analysis: legible in grey, axes with units. Rows in, a matplotlib Figure
out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "mor",  # the same figure gives the same file
}
GREYS = ("#111111", "#4f78a8", "#9db7d2", "#777777", "#bbbbbb", "#333333")  # of different lightness
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write ``name``.png (150 dpi) and ``name``.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png", dpi=150)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def new_axes(
    width: float = 6.4, height: float = 3.6, columns: int = 1, *, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure (inches) with axes side by side."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, list(np.atleast_1d(figure.subplots(1, columns, sharey=share_y)))


def series(i: int) -> dict[str, Any]:
    """Look of the i-th line: lightness, dash and marker all differ. Every second six have hollow
    markers."""
    turn = i // 6
    marker = dict(marker=MARKERS[(i + turn // 2) % 6], markersize=4.5)
    return (
        dict(color=GREYS[i % 6], linestyle=DASHES[(i + turn) % 6])
        | marker
        | ({"markerfacecolor": "#ffffff"} if turn % 2 else {})
    )


def literal(name: str) -> str:
    """A user's name as a text of matplotlib, which takes what is between two $ for mathematics."""
    return name.replace("$", r"\$")


def _line(
    axes: Axes, x: Sequence, y: Sequence, i: int, label: str | None = None, marker: bool = True
) -> None:
    axes.plot(
        x, y, **(series(i) | ({} if marker else {"marker": None})), label=label, linewidth=1.5
    )


def _labels(axes: Axes, x: str, y: str, *, legend: bool = False) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if legend:  # above the axes, where it covers nothing
        axes.legend(
            frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, columnspacing=1
        )


def _intervals(axes: Axes, y: Sequence[float], rows: Rows) -> None:
    """Means as dots with their intervals."""
    axes.plot([r["mean"] for r in rows], y, "o", color=GREYS[0], markersize=4.5)
    for place, row in zip(y, rows, strict=True):
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=GREYS[0], linewidth=1.4)


def loss_curve(metrics: Rows) -> Figure:
    """Training and validation loss over tokens seen, from metrics.jsonl."""
    figure, (axes,) = new_axes()
    train = [m for m in metrics if m.get("loss") is not None]
    held_out = [m for m in metrics if m.get("validation_nll") is not None]
    axes.plot(
        [m["tokens"] for m in train],
        [m["loss"] for m in train],
        color=GREYS[4],
        linewidth=1,
        label="training",
    )
    if held_out:
        _line(
            axes,
            [m["tokens"] for m in held_out],
            [m["validation_nll"] for m in held_out],
            0,
            "validation, causal",
        )
    _labels(axes, "training tokens", "loss, nats per token", legend=True)
    return figure


def router_health(metrics: Rows) -> Figure:
    """Share of tokens in each recursion, and the health figures of the router, over training
    steps."""
    figure, (left, right) = new_axes(10.5, 3.6, 2)
    rows = [m for m in metrics if m.get("share_per_recursion")]
    steps = [m["step"] for m in rows]
    for r, shares in enumerate(zip(*(m["share_per_recursion"] for m in rows), strict=True)):
        _line(left, steps, shares, r, f"recursion {r + 1}", marker=False)
    _labels(left, "training step", "share of tokens", legend=True)
    names = {"depth_entropy": "depth entropy", "agreement": "agreement with top-k (non-causal)"}
    names |= {"dead_positions": "dead positions", "max_violation": "largest overload (MaxVio)"}
    for i, (name, label) in enumerate(names.items()):
        known = [(m["step"], m[name]) for m in rows if m.get(name) is not None]
        if known:
            _line(
                right,
                [step for step, _ in known],
                [value for _, value in known],
                i,
                label,
                marker=False,
            )
    _labels(right, "training step", "share, or 1 = even (entropy)", legend=True)
    return figure


def depth_histogram(rows: Rows) -> Figure:
    figure, (axes,) = new_axes(4.8, 3.2)
    bars = axes.bar(
        [str(r["depth"]) for r in rows],
        [r["share"] for r in rows],
        color=GREYS[2],
        edgecolor=GREYS[0],
    )
    axes.bar_label(bars, [f"{r['share']:.1%}" for r in rows])
    _labels(axes, "depth, recursions", "share of tokens")
    axes.grid(axis="x", visible=False)
    return figure


def dead_tokens(rows: Rows) -> Figure:
    figure, (axes,) = new_axes(4.8, 3.2)
    x = np.arange(len(rows))
    for i, (name, label) in enumerate(
        {"dead_positions": "positions", "dead_types": "distinct tokens"}.items()
    ):
        values = [r[name] or 0 for r in rows]
        bars = axes.bar(
            x + (i - 0.5) * 0.38, values, 0.36, color=GREYS[2 * i], edgecolor=GREYS[0], label=label
        )
        axes.bar_label(bars, ["–" if r[name] is None else f"{r[name]:.1%}" for r in rows])
    axes.set_xticks(x, [str(r["recursion"]) for r in rows])
    axes.set_ylim(0, max(0.05, axes.get_ylim()[1] * 1.15))
    _labels(axes, "recursion", "share that never took it", legend=True)
    return figure


def depth_predictors(rows: Rows) -> Figure:
    figure, (axes,) = new_axes(4.8, 2.4)
    values = [r["explained"] for r in rows]
    axes.barh([r["predictor"] for r in rows], values, color=GREYS[2], edgecolor=GREYS[0])
    for place, value in enumerate(values):
        axes.text(max(value, 0) + 0.02, place, f"{value:.1%}", va="center")
    axes.invert_yaxis()
    axes.set_xlim(min(0, *values) - 0.02, 1.15)
    axes.grid(axis="y", visible=False)
    _labels(axes, "share of the depth's variance explained (held out)", "")
    return figure


def agreement(rows: Rows) -> Figure:
    figure, (axes,) = new_axes(5.6, 3.2)
    names = {"same_decision": "same decision", "share_threshold": "taken by threshold"}
    names |= {"share_topk_non_causal": "taken by top-k (non-causal)"}
    x = np.arange(len(rows))
    for i, (name, label) in enumerate(names.items()):
        look: dict[str, Any] = dict(
            color="#ffffff" if i else GREYS[2], edgecolor=GREYS[0], hatch=HATCHES[i], label=label
        )
        bars = axes.bar(x + (i - 1) * 0.27, [r[name] for r in rows], 0.25, **look)
        axes.bar_label(bars, [f"{r[name]:.1%}" for r in rows], fontsize=7)
    axes.set_xticks(x, [str(r["recursion"]) for r in rows])
    axes.set_ylim(0, 1.05)
    _labels(axes, "recursion", "share of the candidates", legend=True)
    return figure


def score_histogram(rows: Rows) -> Figure:
    recursions = sorted({r["recursion"] for r in rows})
    figure, panels = new_axes(3.2 * len(recursions) + 0.6, 3, len(recursions))
    for axes, recursion in zip(panels, recursions, strict=True):
        for i, chosen in enumerate((True, False)):
            own = [r for r in rows if r["recursion"] == recursion and r["taken"] == chosen]
            total = sum(r["tokens"] for r in rows if r["recursion"] == recursion) or 1
            look: dict[str, Any] = dict(
                color="#ffffff" if i else GREYS[1],
                hatch=HATCHES[i],
                edgecolor=GREYS[0],
                linewidth=0.6,
            )
            below = (
                []
                if i == 0
                else [
                    r["tokens"] / total for r in rows if r["recursion"] == recursion and r["taken"]
                ]
            )
            heights, width = [r["tokens"] / total for r in own], own[0]["high"] - own[0]["low"]
            label = "not taken" if i else "taken"
            axes.bar(
                [r["low"] for r in own],
                heights,
                width,
                below or 0,
                align="edge",
                label=label,
                **look,
            )
        _labels(
            axes,
            f"router score at recursion {recursion}",
            "share of scored tokens",
            legend=axes is panels[0],
        )
    return figure


def drift(rows: Rows) -> Figure:
    """Cosines as a matrix; relative change of consecutive stages as bars."""
    figure, (left, right) = new_axes(8, 3.4, 2)
    stages = sorted({r["earlier"] for r in rows} | {r["later"] for r in rows})
    matrix = np.full((len(stages), len(stages)), np.nan)
    for r in rows:
        matrix[stages.index(r["earlier"]), stages.index(r["later"])] = r["cosine"]
        shade = "#ffffff" if r["cosine"] < 0.5 else "#000000"
        place = (stages.index(r["later"]), stages.index(r["earlier"]))
        left.text(*place, f"{r['cosine']:.2f}", color=shade, ha="center", va="center")
    left.imshow(matrix, cmap="gray", vmin=-0.2, vmax=1.1)
    left.set_xticks(range(len(stages)), stages)
    left.set_yticks(range(len(stages)), stages)
    left.grid(visible=False)
    left.set_title("cosine between states", fontsize=9)
    _labels(left, "after recursion (0: before the first)", "after recursion")
    steps = [r for r in rows if r["later"] == r["earlier"] + 1]
    heights = [r["relative_change"] for r in steps]
    bars = right.bar(
        [f"{r['earlier']}→{r['later']}" for r in steps], heights, color=GREYS[2], edgecolor=GREYS[0]
    )
    right.bar_label(bars, fmt="%.2f")
    right.grid(axis="x", visible=False)
    _labels(right, "recursion", "length of the change / length of the state")
    return figure


def kv_similarity(rows: Rows) -> Figure:
    figure, panels = new_axes(8, 3.2, 2)
    pairs = sorted({(r["earlier"], r["later"]) for r in rows})
    for axes, kind in zip(panels, ("keys", "values"), strict=True):
        for i, (a, b) in enumerate(pairs):
            own = [r for r in rows if (r["earlier"], r["later"]) == (a, b)]
            _line(
                axes,
                [r["layer"] for r in own],
                [r[f"cosine_{kind}"] for r in own],
                i,
                f"recursions {a} and {b}",
            )
        axes.set_xticks(sorted({r["layer"] for r in rows}))
        axes.set_ylim(min(0, axes.get_ylim()[0]), 1.02)
        _labels(axes, "shared layer", f"mean cosine of {kind}", legend=axes is panels[0])
    return figure


def depth_scaling(rows: Rows) -> Figure:
    figure, (axes,) = new_axes(5.2, 3.4)
    trained = [r for r in rows if not r["extrapolated"]]
    further = [trained[-1], *(r for r in rows if r["extrapolated"])]
    if len(further) > 1:
        style: dict[str, Any] = dict(
            linestyle="--", marker="o", markerfacecolor="#ffffff", color=GREYS[1]
        )
        axes.plot(
            [r["max_depth"] for r in further],
            [r["nll"] for r in further],
            label="beyond training",
            **style,
        )
    _line(axes, [r["max_depth"] for r in trained], [r["nll"] for r in trained], 0, "trained depths")
    for r in rows:
        note = f"{r['mean_depth']:.2f}"
        axes.annotate(
            note, (r["max_depth"], r["nll"]), xytext=(0, 7), textcoords="offset points", ha="center"
        )
    axes.set_xticks([r["max_depth"] for r in rows])
    axes.margins(y=0.15)
    _labels(
        axes,
        "cap on the depth, recursions (figures: mean depth)",
        "NLL, nats per token (causal)",
        legend=True,
    )
    return figure


def depth_by_class(rows: Rows) -> Figure:
    figure, (axes,) = new_axes(6.2, 0.26 * len(rows) + 1.3)
    y, names, place = [], [], 0.0
    for i, row in enumerate(rows):
        place += 0.7 if i and row["by"] != rows[i - 1]["by"] else 0
        y.append(place)
        names.append(f"{row['group']}  (n={row['count']:,})")
        place += 1
    _intervals(axes, y, rows)
    axes.set_yticks(y, names)
    axes.invert_yaxis()
    _labels(axes, "mean depth, recursions (95% interval)", "")
    return figure


def counterfactual_gains(rows: Rows) -> Figure:
    figure, (axes,) = new_axes(6.2, 0.4 * len(rows) + 1.2)
    y = list(range(len(rows)))
    _intervals(axes, y, rows)
    axes.axvline(0, color=GREYS[3], linewidth=1)
    to = [r["depth"] + (1 if r["change"] == "more" else -1) for r in rows]
    axes.set_yticks(
        y, [f"depth {r['depth']} → {d}  (n={r['count']:,})" for r, d in zip(rows, to, strict=True)]
    )
    axes.invert_yaxis()
    axes.margins(y=0.2)
    _labels(axes, "mean change of the target's log-probability, nats (95% interval)", "")
    return figure
