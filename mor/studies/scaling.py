"""Scaling fits: compute-optimal sizes from isoFLOP curves, and what one recursion is worth in
parameters.

Losses are NLL in nats, sizes are parameters, budgets are training FLOPs. Intervals are 95%
bootstrap intervals. Their noise is as large as between seeds where there are several, otherwise as
large as the caller states. Noise multiplies the NLL: losses near 0 vary little, and none falls
below 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import variance
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mor.statistics import bootstrap_bounds
from mor.studies.study import LABEL, row_name

Array = NDArray[np.float64]
# A minimum farther outside the measured log sizes does not count: the curve is flat or a slope.
REACH = math.log(1000)
PHI_BOUND = 3.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured model. size: parameters, the axis of the fit. once: parameters that are applied
    once; looped: those of the shared stack, which is applied ``loops`` times."""

    family: str
    size: float
    budget: float
    tokens: float
    nll: float
    seed: int = 0
    once: float = 0.0
    looped: float = 0.0
    loops: int = 1


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best size for a budget, from a parabola in log size. inside: between the smallest and the
    largest size measured, otherwise it is extrapolated and worth little.

    no_minimum: share of the bootstrap resamples whose parabola has no minimum. Their best size is
    unknown, so each widens the interval at both ends; above one in forty the bounds are NaN. The
    size itself is NaN where the measured parabola has no minimum.
    """

    family: str
    budget: float
    size: float
    size_low: float
    size_high: float
    tokens: float
    tokens_low: float
    tokens_high: float
    nll: float
    inside: bool
    no_minimum: float


@dataclass(frozen=True, kw_only=True)
class ScalingPath:
    """How the best model grows with the budget: best size ~ budget ** size_slope, best tokens ~
    budget ** tokens_slope.

    no_minimum: share of the resamples without a slope, because the parabola of some budget has no
    minimum (see Optimum).
    """

    family: str
    size_slope: float
    size_low: float
    size_high: float
    tokens_slope: float
    tokens_low: float
    tokens_high: float
    no_minimum: float


@dataclass(frozen=True, kw_only=True)
class RecurrenceLaw:
    """NLL = floor + a * (once + loops ** phi * looped) ** -alpha + b * tokens ** -beta.

    phi = 1: a recursion is worth as much as fresh layers; phi = 0: nothing. A bound of phi is NaN
    where the resamples reach the limit that the fit allows. rms: of the residuals, in nats.
    """

    family: str
    points: int
    phi: float
    phi_low: float
    phi_high: float
    floor: float
    alpha: float
    beta: float
    rms: float


def parabola(points: Sequence[Point]) -> Array:
    """Coefficients of NLL over log size, the highest power first."""
    return np.polyfit(np.log([p.size for p in points]), [p.nll for p in points], 2)


def lowest_point(points: Sequence[Point]) -> tuple[float, float]:
    """(log size, NLL) where the parabola is lowest; NaN if it has no minimum within REACH."""
    curve = parabola(points)
    best = -curve[1] / (2 * curve[0]) if curve[0] > 0 else math.nan
    sizes = [math.log(p.size) for p in points]
    if not min(sizes) - REACH <= best <= max(sizes) + REACH:
        return math.nan, math.nan
    return float(best), float(np.polyval(curve, best))


def optima(
    points: Sequence[Point], *, noise: float = 0.0, resamples: int = 1000, seed: int = 0
) -> list[Optimum]:
    """One for each family and budget with at least three sizes. noise: standard deviation of an NLL
    in nats, for points without a second seed."""
    found = []
    for family, budget in _groups(points):
        chosen = [p for p in points if (p.family, p.budget) == (family, budget)]
        if len({p.size for p in chosen}) < 3:
            continue
        best, nll = lowest_point(chosen)
        drawn = np.array(
            [lowest_point(sample)[0] for sample in _resamples(chosen, noise, resamples, seed)]
        )
        at = np.array([best, *bootstrap_bounds(drawn)])
        sizes, tokens = np.exp(at).tolist(), np.exp(_log_tokens(chosen, at)).tolist()
        found.append(
            Optimum(
                family=family,
                budget=budget,
                size=sizes[0],
                size_low=sizes[1],
                size_high=sizes[2],
                tokens=tokens[0],
                tokens_low=tokens[2],
                tokens_high=tokens[1],
                nll=nll,
                inside=bool(min(p.size for p in chosen) <= sizes[0] <= max(p.size for p in chosen)),
                no_minimum=float(np.isnan(drawn).mean()),
            )
        )
    return found


def _groups(points: Iterable[Point]) -> list[tuple[str, float]]:
    return list(dict.fromkeys((p.family, p.budget) for p in sorted(points, key=lambda p: p.budget)))


def _log_tokens(points: Sequence[Point], log_size: Any) -> Any:
    """Log tokens that the budget buys at a size: a straight line over log size."""
    line = np.polyfit(np.log([p.size for p in points]), np.log([p.tokens for p in points]), 1)
    return np.polyval(line, log_size)


def _resamples(
    points: Sequence[Point], noise: float, count: int, seed: int
) -> Iterable[list[Point]]:
    """The points with fresh noise (parametric bootstrap): that between seeds, or ``noise`` nats."""
    random = np.random.default_rng(seed)
    between_seeds = _deviation_between_seeds(points)
    for _ in range(count):
        found = []
        for p in points:
            deviation = noise / p.nll if between_seeds is None else between_seeds
            found.append(replace(p, nll=p.nll * math.exp(random.normal(0, deviation))))
        yield found


def _deviation_between_seeds(points: Sequence[Point]) -> float | None:
    """Standard deviation of the log NLL between seeds, pooled over all models; None where no model
    has two.

    Pooled, because two or three seeds of one model say next to nothing about its own deviation.
    """
    models: dict[Any, list[float]] = {}
    for p in points:
        models.setdefault((p.family, p.size, p.tokens), []).append(math.log(p.nll))
    freedom = sum(len(nll) - 1 for nll in models.values())
    squares = sum((len(nll) - 1) * variance(nll) for nll in models.values() if len(nll) > 1)
    return math.sqrt(squares / freedom) if freedom else None


def paths(
    points: Sequence[Point], *, noise: float = 0.0, resamples: int = 1000, seed: int = 0
) -> list[ScalingPath]:
    """How best size and token count grow with the budget, for families with two or more budgets."""
    found = []
    for family in dict.fromkeys(p.family for p in points):
        chosen = [p for p in points if p.family == family]
        slopes = _slopes(chosen)
        if slopes is None:
            continue
        drawn = np.array(
            [_slopes(s) or (math.nan, math.nan) for s in _resamples(chosen, noise, resamples, seed)]
        )
        (size_low, size_high), (tokens_low, tokens_high) = (
            bootstrap_bounds(drawn[:, 0]),
            bootstrap_bounds(drawn[:, 1]),
        )
        found.append(
            ScalingPath(
                family=family,
                size_slope=slopes[0],
                size_low=size_low,
                size_high=size_high,
                tokens_slope=slopes[1],
                tokens_low=tokens_low,
                tokens_high=tokens_high,
                no_minimum=float(np.isnan(drawn[:, 0]).mean()),
            )
        )
    return found


def _slopes(points: Sequence[Point]) -> tuple[float, float] | None:
    budgets, sizes, tokens = [], [], []
    for budget in sorted({p.budget for p in points}):
        chosen = [p for p in points if p.budget == budget]
        if len({p.size for p in chosen}) < 3:
            continue
        best, _ = lowest_point(chosen)
        budgets.append(math.log(budget))
        sizes.append(best)
        tokens.append(_log_tokens(chosen, best))
    if len(budgets) < 2 or np.isnan(sizes).any():
        return None
    return float(np.polyfit(budgets, sizes, 1)[0]), float(np.polyfit(budgets, tokens, 1)[0])


def recurrence_law(
    points: Sequence[Point], *, family: str, noise: float = 0.0, resamples: int = 200, seed: int = 0
) -> RecurrenceLaw:
    """Fit of the law to one looped family together with the points that do not loop.

    Raises ValueError where the data do not determine phi: with no more points than the law has
    parameters, with fewer than three sizes that loop or three that do not, or where the best fit
    lies at a limit of phi.
    """
    chosen = [p for p in points if p.family == family or p.loops == 1]
    if len(chosen) < 7:
        raise ValueError(
            f"the law has 6 parameters and needs 7 points; {family!r} has {len(chosen)}"
        )
    looped, once = ({p.size for p in chosen if (p.loops > 1) is loops} for loops in (True, False))
    if min(len(looped), len(once)) < 3:
        raise ValueError(
            f"phi of {family!r} is not determined by {len(looped)} sizes that loop and "
            f"{len(once)} that do not; it takes three of each"
        )
    measured = _columns(chosen)
    solution = _fit_law(measured, None)
    if _at_bound(solution[5]):
        raise ValueError(
            f"phi of {family!r} is not determined: the best fit is at a limit of "
            f"[-{PHI_BOUND:g}, {PHI_BOUND:g}]"
        )
    drawn = np.array(
        [_fit_law(_columns(s), solution)[5] for s in _resamples(chosen, noise, resamples, seed)]
    )
    drawn = np.where(_at_bound(drawn), np.copysign(math.inf, drawn), drawn)
    low, high = bootstrap_bounds(drawn)
    residual = _law(solution, measured) - measured["nll"]
    return RecurrenceLaw(
        family=family,
        points=len(chosen),
        phi=float(solution[5]),
        phi_low=low,
        phi_high=high,
        floor=float(solution[0]),
        alpha=float(solution[2]),
        beta=float(solution[4]),
        rms=float(np.sqrt(np.mean(np.square(residual)))),
    )


def _at_bound(phi: Any) -> Any:
    return np.abs(phi) > 0.99 * PHI_BOUND


def _columns(points: Sequence[Point]) -> dict[str, Array]:
    return {
        n: np.array([float(getattr(p, n)) for p in points])
        for n in ("once", "looped", "loops", "tokens", "nll")
    }


def _law(parameters: Sequence[float] | Array, at: dict[str, Array]) -> Array:
    floor, log_a, alpha, log_b, beta, phi = map(float, parameters)
    size = at["once"] + at["loops"] ** phi * at["looped"]
    of_size: Array = np.exp(log_a - alpha * np.log(size))
    of_tokens: Array = np.exp(log_b - beta * np.log(at["tokens"]))
    return floor + of_size + of_tokens


def _fit_law(at: dict[str, Array], start: Array | None) -> Array:
    """Least squares with a robust loss; from several starts, or from a known solution."""
    from scipy.optimize import least_squares

    lowest = at["nll"].min()
    bounds = ([0, -20, 0.02, -20, 0.02, -PHI_BOUND], [lowest, 40, 2.5, 60, 2.5, PHI_BOUND])
    mid_size = np.median(np.log(at["once"] + at["looped"]))
    mid_tokens = np.median(np.log(at["tokens"]))
    log_scale = math.log(0.3)
    starts: Iterable[Any] = [start]
    if start is None:
        starts = [
            (lowest * share, log_scale + a * mid_size, a, log_scale + b * mid_tokens, b, 0.5)
            for share in (0.2, 0.6, 0.9)
            for a in (0.2, 0.5)
            for b in (0.3, 0.8, 1.5)
        ]
    fits = [
        least_squares(
            lambda x: _law(x, at) - at["nll"],
            np.clip(begin, *_inside(bounds)),
            bounds=bounds,
            loss="soft_l1",
            f_scale=0.03,
            x_scale="jac",
        )
        for begin in starts
    ]
    best: Array = min(fits, key=lambda fit: fit.cost).x
    return best


def _inside(bounds: Any) -> tuple[Array, Array]:
    low, high = np.array(bounds[0], float), np.array(bounds[1], float)
    return low + 1e-6 * (high - low), high - 1e-6 * (high - low)


def points_of(
    runs: Iterable[dict[str, Any]], size: Callable[[dict[str, Any]], float]
) -> list[Point]:
    """Finished runs of a study with budgets, as points. size: what counts as a model's size. An
    axis that does not change it, such as one of alphas, makes a family of every value."""
    runs = [run for run in runs if run["budget"]]
    others = [axis for axis in labels_of(runs) if not _changes(runs, axis, size)]
    return [
        Point(
            family=row_name(
                run["variant"],
                {axis.removeprefix(LABEL): run[axis] for axis in others if axis in run},
            ),
            size=size(run),
            budget=run["budget"],
            tokens=run["tokens"],
            nll=run["validation_nll"],
            seed=run["seed"],
            once=run["params"] - run["looped_params"],
            looped=run["looped_params"],
            loops=run["config_model_num_recursions"],
        )
        for run in runs
    ]


def labels_of(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The columns that hold the axes' values."""
    return list(dict.fromkeys(name for run in runs for name in run if name.startswith(LABEL)))


def _changes(
    runs: Sequence[dict[str, Any]], axis: str, size: Callable[[dict[str, Any]], float]
) -> bool:
    """Whether runs that differ only in this axis differ in size."""
    sizes: dict[tuple[Any, ...], set[float]] = defaultdict(set)
    for run in runs:
        rest = tuple(run.get(other) for other in labels_of(runs) if other != axis)
        sizes[(run["variant"], run["seed"], run["budget"], rest)].add(size(run))
    return any(len(found) > 1 for found in sizes.values())
