"""Fits find what made the data, and their intervals hold it."""

import math

import numpy as np
import pytest

from mor.statistics import bootstrap_bounds
from mor.studies.scaling import Point, lowest_point, optima, paths, points_of, recurrence_law
from mor.studies.scaling import _deviation_between_seeds as deviation_between_seeds
from mor.studies.scaling import _resamples as resamples_of


def test_a_parabola_has_its_minimum_and_a_hill_has_none():
    def points(curve):
        sizes = (1e6, 3e6, 1e7, 4e7)
        return [Point(family="", size=s, budget=1, tokens=1, nll=curve(math.log(s))) for s in sizes]

    best, lowest = lowest_point(points(lambda x: 0.1 * (x - math.log(5e6)) ** 2 + 2.5))
    assert math.isclose(math.exp(best), 5e6, rel_tol=1e-6) and math.isclose(
        lowest, 2.5, rel_tol=1e-9
    )
    assert math.isnan(lowest_point(points(lambda x: -((x - 15) ** 2)))[0])
    assert math.isnan(lowest_point(points(lambda x: 1e-6 * (x - 900) ** 2))[0]), "no size is e^900"


def test_resamples_without_a_figure_widen_its_interval():
    drawn = np.arange(1000.0)
    assert bootstrap_bounds(drawn) == pytest.approx((24.975, 974.025))
    # left out, the bounds were 34.7 and 974.3; anywhere, they are those of 10 more at either end
    drawn[:10] = np.nan
    assert bootstrap_bounds(drawn) == pytest.approx((24.975, 984.025))
    drawn[:30] = np.nan
    assert np.isnan(bootstrap_bounds(drawn)).all()
    drawn[:] = [math.inf] * 30 + [*range(970)]
    low, high = bootstrap_bounds(drawn)
    assert low == pytest.approx(24.975) and math.isnan(high)


def test_flat_noisy_curves_have_no_interval_and_say_why():
    random, points = np.random.default_rng(1), []
    for budget in (4e11, 8e11, 1.6e12):
        for size in (4e4, 8e4, 1.6e5, 3.2e5):
            for seed in range(3):
                nll = (0.3 + 0.02 * math.log(size / 1.2e5) ** 2) * math.exp(random.normal(0, 0.3))
                points.append(
                    Point(
                        family="",
                        size=size,
                        budget=budget,
                        tokens=budget / (6 * size),
                        nll=nll,
                        seed=seed,
                    )
                )
    found = optima(points, resamples=300)
    assert any(o.no_minimum > 0.1 for o in found)
    for o in found:
        assert math.isnan(o.size_low) == math.isnan(o.tokens_high) == (o.no_minimum > 0.025)
    for path in paths(points, resamples=300):
        assert path.no_minimum > 0.1 and math.isnan(path.size_low) and math.isnan(path.tokens_high)


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
                found.append(
                    Point(
                        family=family, size=size, budget=budget, tokens=tokens, nll=nll, seed=seed
                    )
                )
    return found


@pytest.mark.parametrize("exponent", [0.4, 0.55])
def test_the_slope_of_the_optimal_path_lies_in_its_interval(exponent):
    points = made(exponent, seeds=4, noise=0.01)
    for best in optima(points, resamples=200):
        true = 20 * best.budget**exponent
        assert best.size_low < true * 1.05 and best.size_high > true / 1.05 and best.inside
        assert (
            best.size_low < best.size < best.size_high
            and best.tokens_low < best.tokens < best.tokens_high
        )
        assert math.isclose(best.tokens, best.budget / (6 * best.size), rel_tol=1e-6)
    (path,) = paths(points, resamples=200)
    assert path.size_low <= exponent <= path.size_high and path.size_high - path.size_low < 0.2
    assert math.isclose(path.size_slope + path.tokens_slope, 1, abs_tol=1e-6)


def test_noise_is_the_deviation_of_the_log_between_seeds():
    """Two models whose log losses differ by 0.2 and by 0.4: variances 0.02 and 0.08, pooled
    0.05."""
    points = [
        Point(
            family="",
            size=size,
            budget=1.0,
            tokens=1.0,
            nll=nll * math.exp(seed * apart),
            seed=seed,
        )
        for size, nll, apart in ((1.0, 5.0, 0.2), (2.0, 0.01, 0.4))
        for seed in (0, 1)
    ]
    assert deviation_between_seeds(points) == pytest.approx(math.sqrt(0.05))
    assert deviation_between_seeds(points[::2]) is None, "one seed of each"
    drawn = np.log([[p.nll for p in sample] for sample in resamples_of(points, 9.0, 4000, 0)])
    assert drawn.mean(0) == pytest.approx(np.log([p.nll for p in points]), abs=0.02)
    assert drawn.std(0) == pytest.approx([math.sqrt(0.05)] * 4, rel=0.05)


def test_intervals_without_seeds_follow_the_noise_that_is_stated():
    points = made(0.5, seeds=1, noise=0.0)
    narrow, wide = (paths(points, noise=noise, resamples=200)[0] for noise in (0.002, 0.02))
    assert 5 < (wide.size_high - wide.size_low) / (narrow.size_high - narrow.size_low) < 20
    assert optima(points, noise=0.0, resamples=20)[0].size_low == pytest.approx(
        optima(points)[0].size
    )


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


def looped_points(phi=0.5, scale=1.0, seeds=3, noise=0.3):
    random, found = np.random.default_rng(2), []
    for family, loops in (("vanilla", 1), ("recursive", 4)):
        for size in (4e4, 8e4, 1.6e5, 3.2e5):
            for tokens in (2e5, 1e6, 5e6):
                for seed in range(seeds):
                    parts = 300 * (size / 2 + loops**phi * size / 2) ** -0.6 + 300 * tokens**-0.6
                    nll = scale * parts * math.exp(random.normal(0, noise))
                    found.append(
                        Point(
                            family=family,
                            size=size,
                            budget=size * tokens,
                            tokens=tokens,
                            nll=nll,
                            seed=seed,
                            once=size / 2,
                            looped=size / 2,
                            loops=loops,
                        )
                    )
    return found


def test_losses_near_nought_whose_seeds_differ_have_a_law():
    points = looped_points(scale=0.1)
    assert min(p.nll for p in points) < 0.02
    law = recurrence_law(points, family="recursive", resamples=20)
    assert law.phi_low < 0.5 < law.phi_high


def test_a_law_that_the_points_do_not_determine_is_refused():
    with pytest.raises(ValueError, match="needs 7 points"):
        recurrence_law(made(0.5, 1, 0.0)[:5], family="recursive")
    points = looped_points(seeds=1, noise=0.0)
    few = [p for p in points if p.loops == 1 or p.size < 1e5]
    with pytest.raises(ValueError, match="2 sizes that loop and 4 that do not"):
        recurrence_law(few, family="recursive")
    with pytest.raises(ValueError, match="at a limit of"):
        recurrence_law(looped_points(phi=4.0, seeds=1, noise=0.0), family="recursive")


def test_runs_of_a_study_become_points():
    run = dict(
        variant="MoR",
        budget=1e12,
        tokens=5e6,
        validation_nll=0.5,
        seed=2,
        params=100,
        looped_params=60,
    )
    run |= dict(config_model_num_recursions=4)
    (point,) = points_of([run, run | {"budget": None}], lambda run: run["params"])
    assert (point.family, point.size, point.once, point.looped, point.loops) == (
        "MoR",
        100,
        40,
        60,
        4,
    )
    assert (point.budget, point.tokens, point.nll, point.seed) == (1e12, 5e6, 0.5, 2)
    grid = [
        run | {"params": params, "label_size": f"d{params}", "label_alpha": alpha, "seed": seed}
        for params in (100, 200)
        for alpha in ("0.1", "1")
        for seed in (0, 1)
    ]
    points = points_of(grid, lambda run: run["params"])
    of_one_size = ["MoR, alpha 0.1"] * 2 + ["MoR, alpha 1"] * 2
    assert [p.family for p in points] == of_one_size * 2, "sizes are one family, alphas are not"
