"""The look that all figures share: colours, titles, names at the ends of lines, intervals.

Colours differ in lightness too, so that they hold in grey and for colour-blind readers, and every
line has a dash and a marker of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

INK, SOFT, FAINT, PALE = "#1d2329", "#5b6670", "#d9dee3", "#b4cde6"
COLOURS = ("#14315c", "#d55e00", "#4aa5dc", "#00694f", "#e8b41c", "#8c4a97")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
SMALL = 8.0  # points: notes and names in crowded places
STYLE: Any = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.color": SOFT,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "mor",  # the same figure gives the same file
}


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write ``name``.png and ``name``.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        save_as(figure, folder / f"{name}{suffix}")


def save_as(figure: Figure, path: Path) -> None:
    """Write one file: a .png (150 dpi) or a .svg."""
    look: dict[str, Any] = dict(metadata={"Date": None}) if path.suffix == ".svg" else dict(dpi=150)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, **look)


def new_figure(title: str, width: float = 6.4, height: float = 3.4) -> Figure:
    """An empty figure (inches) with its title at the upper left."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return figure


def new_axes(
    title: str, width: float = 6.4, height: float = 3.4, columns: int = 1, **sharing: bool
) -> tuple[Figure, list[Axes]]:
    """A figure with axes side by side. sharing: sharex, sharey."""
    figure = new_figure(title, width, height)
    return figure, list(new_grid(figure, 1, columns, **sharing)[0])


def new_grid(figure: Figure, rows: int, columns: int, **sharing: bool | str) -> NDArray[Any]:
    """Axes in rows and columns, (rows, columns)."""
    with matplotlib.rc_context(STYLE):
        sharing_: Any = sharing
        axes: NDArray[Any] = figure.subplots(rows, columns, squeeze=False, **sharing_)
    return axes


def series(i: int) -> dict[str, Any]:
    """Colour, dash and marker of the i-th line; every second six have hollow markers."""
    turn = i // 6
    look = dict(color=COLOURS[i % 6], linestyle=DASHES[(i + turn) % 6])
    look |= dict(marker=MARKERS[(i + turn // 2) % 6])
    return look | ({"markerfacecolor": "#ffffff"} if turn % 2 else {})


def shades(count: int) -> list[tuple[float, ...]]:
    """Colours of values in order, from pale to dark."""
    pale, dark = (np.array(to_rgb(c)) for c in ("#8fc1e8", COLOURS[0]))
    return [tuple(pale + (dark - pale) * s) for s in np.linspace(0, 1, count)]


def literal(name: str) -> str:
    """A user's name as matplotlib text, where a pair of $ would begin mathematics."""
    return name.replace("$", r"\$")


def name_lines(
    axes: Axes, lines: Sequence[Line2D], names: Sequence[str], *, at_edge: bool = True
) -> None:
    """Each name beside the last point of its line, or at the edge of the axes; moved up or down
    where names would overlap. Call it when the limits of the axes are final."""
    axes.autoscale_view()
    points = [np.asarray(line.get_xydata(), float) for line in lines]
    for line, known in zip(lines, points, strict=True):
        if len(known) == 1 and line.get_marker() == "None":  # a line of one point is invisible
            line.set_marker("o")
    finite = [point[np.isfinite(point[:, 1])] for point in points]
    if empty := [name for name, known in zip(names, finite, strict=True) if not len(known)]:
        raise ValueError(f"nothing to draw for {empty[0]!r}: none of its numbers is finite")
    ends = np.array([known[-1] for known in finite])
    lines_each = max(name.count("\n") + 1 for name in names)
    gap = 1.35 * lines_each * SMALL / 72 / _height(axes)
    places = apart((axes.transScale + axes.transLimits).transform(ends)[:, 1], gap)
    leader = dict(arrowstyle="-", color="#b8c0c8", linewidth=0.7, shrinkA=1, shrinkB=4)
    for line, name, end, place in zip(lines, names, ends, places, strict=True):
        axes.annotate(
            literal(name if at_edge else f"  {name}"),
            end,
            (1.03 if at_edge else end[0], place),
            textcoords=("axes fraction" if at_edge else "data", "axes fraction"),
            color=darker(line.get_color()),
            fontsize=SMALL,
            va="center",
            annotation_clip=False,
            arrowprops=leader | {"relpos": (0, 0.5)} if at_edge else None,
        )


def _height(axes: Axes) -> float:
    """Approximate height of the axes, in inches."""
    figure, place = axes.get_figure(root=True), axes.get_subplotspec()
    assert figure is not None and place is not None
    return 0.72 * float(figure.get_size_inches()[1]) / place.get_gridspec().nrows


def apart(places: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """The nearest places (least squares) that keep their order and a ``gap`` between them."""
    from scipy.optimize import isotonic_regression  # imported here: it takes long

    order = np.argsort(places, kind="stable")
    offsets = gap * np.arange(len(places))
    moved = np.empty(len(places))
    moved[order] = isotonic_regression(places[order] - offsets).x + offsets
    return moved


def darker(colour: Any) -> tuple[float, ...]:
    """The colour as one of small text: pale ones would not be read on white."""
    red, green, blue = to_rgb(colour)
    light = 0.3 * red + 0.6 * green + 0.1 * blue
    return tuple(c * min(0.8, 0.35 / max(light, 0.01)) for c in (red, green, blue))


def name_panel(axes: Axes, text: str, size: float = 9) -> None:
    axes.set_title(text, loc="left", fontsize=size)


def legend(axes: Axes) -> None:
    """Above the axes, where it covers nothing."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1),
        ncols=3,
        columnspacing=1.2,
        frameon=False,
        fontsize=SMALL,
    )


def intervals(axes: Axes, places: Sequence[float], rows: Sequence[dict[str, Any]]) -> None:
    """Means as dots with their intervals, one above the other; None for low: no interval."""
    known = [(place, r) for place, r in zip(places, rows, strict=True) if r["low"] is not None]
    axes.hlines(
        [place for place, _ in known],
        [r["low"] for _, r in known],
        [r["high"] for _, r in known],
        color=COLOURS[0],
        linewidth=1.6,
    )
    axes.plot([r["mean"] for r in rows], places, "o", color=COLOURS[0], markersize=5)


def short_numbers(axis: Any) -> None:
    """Ticks as 200M or 2B."""
    number = EngFormatter(sep="")
    axis.set_major_formatter(lambda value, _: number(value).replace("G", "B"))


def readable(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, as 200M or 2B and not as 2 x 10^8."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    short_numbers(axis)
