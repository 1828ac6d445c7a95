"""The picture of the demo's task: right answers and mean depth by hops."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mor.analysis.style import SMALL, SOFT, name_lines, new_axes, series
from mor.demo.task import STATES, TaskRow
from mor.demo.text import NAMES


def answers_and_depth(rows: Sequence[TaskRow]) -> Figure:
    """A line for each model, which looks as in the picture of the text, from one hop on."""
    title = "State tracking: right answers and depth by hops"
    figure, (left, right) = new_axes(title, 9.6, 3.8, 2)
    for axes, name in ((left, "answers_right_by_hops"), (right, "mean_depth_by_hops")):
        drawn = []
        for row in rows:
            values, look = getattr(row, name), series(NAMES.index(row.name))
            drawn += axes.plot(range(1, len(values) + 1), values, **look)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("hops asked for")
        if axes is left:
            axes.set(ylabel="share of right answers (causal)", ylim=(0, 1.03))
            axes.axhline(1 / STATES, color=SOFT, linewidth=1, linestyle=":")
            axes.text(1, 1 / STATES + 0.02, "chance", fontsize=SMALL, color=SOFT)
        else:
            axes.set_ylabel("mean depth, recursions")
        name_lines(axes, drawn, [row.name for row in rows])
    return figure
