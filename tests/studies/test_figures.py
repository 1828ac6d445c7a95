"""Figures of studies: rows, panels and names."""

from types import SimpleNamespace

import numpy as np
import pytest

from mor.analysis import style
from mor.studies import figures as study_figures
from mor.studies.scaling import Optimum, Point


def test_names_of_rows_and_families_stand_in_the_figures_as_they_are(tmp_path):
    names = ["_hidden", r"$\foo$", "a $1 b"]
    run = dict(
        validation_nll=1.0, answers_right_by_hops=[0.5, 1.0], mean_depth_by_hops=[1.0, 1.5, 2.0]
    )
    rows = [
        SimpleNamespace(row=n, nll=1.0, difference=0.1, difference_low=None, difference_high=None)
        for n in names
    ]
    points = [
        Point(family=n, size=s, budget=1e12, tokens=1e6, nll=(s - 2e6) ** 2)
        for n in names
        for s in (1e6, 2e6, 4e6)
    ]
    bounds = dict.fromkeys(
        ("size", "size_low", "size_high", "tokens", "tokens_low", "tokens_high"), 2e6
    )
    best = [
        Optimum(family=name, budget=1e12, nll=0.0, inside=True, no_minimum=0.0, **bounds)
        for name in names
    ]
    runs = {name: {0: run} for name in names}
    for kind, figure in {
        "rows": study_figures.rows_figure(rows, runs),
        "hops": study_figures.hops_figure(rows, runs),
        "isoflop": study_figures.isoflop_figure(points, best, size_name="size"),
        "paths": study_figures.paths_figure(best, size_name="size"),
    }.items():
        style.save(figure, tmp_path, kind)
        svg = (tmp_path / f"{kind}.svg").read_text()
        assert all(f">{name}</text>" in svg for name in names), kind


def line_of(row, nll, difference=None):
    return SimpleNamespace(
        row=row, nll=nll, difference=difference, difference_low=None, difference_high=None
    )


def test_rows_are_sorted_with_the_controls_apart_and_the_reference_named():
    lines = [line_of("b", 2.0), line_of("one pass", 9.0), line_of("a", 1.0), line_of("MoR", 3.0)]
    runs = {line.row: {0: {"validation_nll": line.nll}} for line in lines}
    figure = study_figures.rows_figure(
        lines, runs, title="Gates", reference="MoR", controls=["MoR", "one pass"]
    )
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["MoR", "one pass", "a", "b"]
    gaps = np.diff(left.get_yticks())
    assert gaps[1] > gaps[0] == gaps[2]
    assert "difference from 'MoR'" in right.get_xlabel() and figure.get_suptitle() == "Gates"


def hops_runs(seed):
    return dict(answers_right_by_hops=[1.0, 0.5 + 0.1 * seed], mean_depth_by_hops=[None, 1.0, 2.0])


@pytest.mark.parametrize(("count", "panels"), [(5, 2), (7, 16)])
def test_more_than_five_rows_by_hops_get_a_panel_each(count, panels):
    lines = [line_of(f"row {i}", 1.0) for i in range(count)]
    runs = {line.row: {seed: hops_runs(seed) for seed in range(3)} for line in lines}
    figure = study_figures.hops_figure(lines, runs, compared="row 0")
    assert len(figure.axes) == panels
    used = [axes for axes in figure.axes if axes.get_visible()]
    assert len(used) == (2 if count == 5 else 14), "four and three, each above its depth"
    assert all(axes.collections for axes in used), "the spread of the seeds"
    widest = max(len(axes.lines) for axes in used)
    assert widest == (5 if count == 5 else 2), "its own line and the one compared"


def test_a_best_size_far_outside_does_not_stretch_the_axis():
    points = [
        Point(family="x", size=s, budget=1e12, tokens=1e6, nll=1.0 + s / 1e7)
        for s in (1e6, 2e6, 4e6)
    ]
    bounds = dict.fromkeys(("size_low", "size_high", "tokens", "tokens_low", "tokens_high"), 2e6)
    far = Optimum(
        family="x", budget=1e12, size=10.0, nll=0.5, inside=False, no_minimum=0.0, **bounds
    )
    figure = study_figures.isoflop_figure(points, [far], size_name="size")
    low, high = figure.axes[0].get_xlim()
    assert low > 5e5 and high < 8e6
    assert figure.axes[0].lines[-1].get_marker() == "<", "an arrow at the edge"
