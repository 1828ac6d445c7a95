"""Colours, dashes and names that are told apart."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mor.analysis import style


def test_every_line_of_a_large_study_has_its_own_look():
    looks = [
        tuple(sorted((name, str(value)) for name, value in style.series(i).items()))
        for i in range(24)
    ]
    assert len(set(looks)) == 24


# Machado and others (2009), on linear RGB: what dichromats see.
BLINDNESS = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "none": np.eye(3),
}


TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
) / np.array([[0.9505], [1.0], [1.089]])


def lab(colour, blindness):
    """CIELAB of a colour as somebody sees it."""
    value = np.array(to_rgb(colour))
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(TO_XYZ @ np.clip(np.array(blindness) @ linear, 0, 1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_are_told_apart_by_everybody(blindness):
    seen = [lab(colour, BLINDNESS[blindness]) for colour in style.COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15


def test_names_at_the_ends_of_lines_keep_their_order_and_their_distance():
    places = np.array([0.5, 0.1, 0.52, 0.9, 0.51])
    moved = style.apart(places, 0.1)
    assert (np.argsort(moved) == np.argsort(places)).all()
    assert np.diff(np.sort(moved)).min() == pytest.approx(0.1)
    assert moved[1] == 0.1 and moved[3] == 0.9, "only where names would overlap"
    assert moved[[0, 2, 4]].mean() == pytest.approx(0.51)


def test_a_line_without_a_finite_number_is_named():
    _, (axes,) = style.new_axes("a figure")
    drawn = [axes.plot([0, 1], y)[0] for y in ([1.0, np.nan], [np.nan, np.inf])]
    with pytest.raises(ValueError, match="nothing to draw for 'b': none of its numbers is finite"):
        style.name_lines(axes, drawn, ["a", "b"])


def test_a_line_of_one_point_is_shown_as_a_point():
    axes = Figure().subplots()
    lines = [axes.plot(range(n), [1.0] * n)[0] for n in (1, 2)]
    style.name_lines(axes, lines, ["one", "two"])
    assert [line.get_marker() for line in lines] == ["o", "None"]
