"""Fits find what made the data, and their intervals hold it."""

import math

import numpy as np
import pytest

from mor.studies.published import PAPER, load_published
from mor.studies.scaling import Point, lowest_point, optima, paths, recurrence_law


def test_a_parabola_has_its_minimum_and_a_hill_has_none():
    def points(curve):
        sizes = (1e6, 3e6, 1e7, 4e7)
        return [Point(family="", size=s, budget=1, tokens=1, nll=curve(math.log(s))) for s in sizes]

    best, lowest = lowest_point(points(lambda x: 0.1 * (x - math.log(5e6)) ** 2 + 2.5))
    assert math.isclose(math.exp(best), 5e6, rel_tol=1e-6) and math.isclose(lowest, 2.5, rel_tol=1e-9)
    assert math.isnan(lowest_point(points(lambda x: -((x - 15) ** 2)))[0])


def made(exponent, seeds, noise, family="vanilla"):
    """Points whose best size is 20 * budget ** exponent; tokens are budget / (6 size)."""
    random = np.random.default_rng(1)
    found = []
    for budget in (1e12, 4e12, 1.6e13):
        best = 20 * budget**exponent
        for factor in (0.25, 0.5, 1, 2, 4):
            for seed in range(seeds):
                nll = 3 + 0.08 * math.log(factor) ** 2 + random.normal(0, noise)
                size, tokens = best * factor, budget / (6 * best * factor)
                found.append(Point(family=family, size=size, budget=budget, tokens=tokens, nll=nll, seed=seed))
    return found


@pytest.mark.parametrize("exponent", [0.4, 0.55])
def test_the_slope_of_the_optimal_path_lies_in_its_interval(exponent):
    points = made(exponent, seeds=4, noise=0.01)
    for best in optima(points, resamples=200):
        true = 20 * best.budget**exponent
        assert best.size_low < true * 1.05 and best.size_high > true / 1.05 and best.inside
        assert math.isclose(best.tokens, best.budget / (6 * best.size), rel_tol=1e-6)
    (path,) = paths(points, resamples=200)
    assert path.size_low <= exponent <= path.size_high and path.size_high - path.size_low < 0.2
    assert math.isclose(path.size_slope + path.tokens_slope, 1, abs_tol=1e-6)


def test_intervals_without_seeds_follow_the_noise_that_is_stated():
    points = made(0.5, seeds=1, noise=0.0)
    narrow, wide = (paths(points, noise=noise, resamples=200)[0] for noise in (0.002, 0.02))
    assert 5 < (wide.size_high - wide.size_low) / (narrow.size_high - narrow.size_low) < 20
    assert optima(points, noise=0.0, resamples=20)[0].size_low == pytest.approx(optima(points)[0].size)


@pytest.mark.parametrize("phi", [0.0, 0.45, 1.0])
def test_the_recurrence_law_finds_the_exponent_that_made_the_data(phi):
    points = []
    for family, loops in (("vanilla", 1), ("recursive", 3)):
        for once in (1e5, 4e5, 1.6e6, 6.4e6):
            for tokens in (1e7, 5e7, 2e8):
                looped = 2 * once if loops > 1 else 0
                nll = 1.5 + 30 * (once + loops**phi * looped) ** -0.3 + 400 * tokens**-0.4
                points.append(
                    Point(
                        family=family,
                        size=once + looped,
                        budget=1.0,
                        tokens=tokens,
                        nll=nll,
                        once=once,
                        looped=looped,
                        loops=loops,
                    )
                )
    law = recurrence_law(points, family="recursive", noise=0.003, resamples=12)
    assert abs(law.phi - phi) < 0.02 and law.rms < 1e-3
    assert law.phi_low < phi < law.phi_high and law.phi_high - law.phi_low < 0.5
    assert abs(law.alpha - 0.3) < 0.02 and abs(law.beta - 0.4) < 0.02


def test_a_law_without_enough_points_is_refused():
    with pytest.raises(ValueError, match="takes 7"):
        recurrence_law(made(0.5, 1, 0.0)[:5], family="recursive")


def test_the_papers_table_is_whole_and_its_best_models_are_where_it_says():
    paper = load_published(PAPER)
    assert len(paper.points) == 36 and {p.family for p in paper.points} == {"vanilla", "recursive", "MoR"}
    assert {round(p.size / 1e6) for p in paper.points if p.family == "vanilla"} == {106, 315, 654, 1611}
    assert math.isclose(sum(p.nll for p in paper.points), 117.0614, abs_tol=1e-3)
    best = {(o.family, o.budget): o for o in optima(paper.points, noise=paper.noise, resamples=50)}
    # At the largest budget the paper prints its best vanilla and MoR losses at 730M.
    assert best["MoR", 1.65e19].size == pytest.approx(252e6, rel=0.3)
    assert all(o.inside for o in best.values())
