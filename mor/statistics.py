"""95% intervals: of means over a few runs, and of groups of tokens, where neighbours are not
independent.

K groups · C blocks
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class MeanInterval:
    """low, high: Student's t interval of the mean of ``count`` independent samples; None where
    there is one only."""

    count: int
    mean: float
    low: float | None
    high: float | None


def mean_interval(samples: Sequence[float]) -> MeanInterval | None:
    """None without samples."""
    if not samples:
        return None
    mean = fmean(samples)
    if len(samples) == 1:
        return MeanInterval(count=1, mean=mean, low=None, high=None)
    half = _t_quantile(len(samples) - 1) * stdev(samples) / math.sqrt(len(samples))
    return MeanInterval(count=len(samples), mean=mean, low=mean - half, high=mean + half)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> MeanInterval | None:
    """values - reference over the seeds that both have; None if there is none."""
    return mean_interval(
        [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    )


def _t_quantile(freedom: int) -> float:
    from scipy.special import stdtrit  # here: only what asks for an interval waits for SciPy

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def bootstrap_bounds(drawn: NDArray[np.float64]) -> tuple[float, float]:
    """Interval of a resampled figure. Where a resample has none (NaN) it may lie anywhere, so it
    widens the interval at both ends. A bound that such resamples, or infinite ones, reach is
    NaN."""
    tail = (1 - CONFIDENCE) / 2
    with np.errstate(invalid="ignore"):  # between two infinite resamples
        low = np.quantile(np.nan_to_num(drawn, nan=-np.inf, posinf=np.inf, neginf=-np.inf), tail)
        high = np.quantile(
            np.nan_to_num(drawn, nan=np.inf, posinf=np.inf, neginf=-np.inf), 1 - tail
        )
    return float(low) if math.isfinite(low) else math.nan, float(high) if math.isfinite(
        high
    ) else math.nan


@dataclass(frozen=True, kw_only=True)
class GroupMean:
    """low, high: 95% interval, None where all tokens of the group lie in a single block, and where
    there are too few of them."""

    group: str
    count: int
    mean: float
    low: float | None
    high: float | None


def group_means(
    values: Sequence[float], groups: Sequence[str], blocks: Sequence[int], *, at_least: int = 1
) -> list[GroupMean]:
    """Mean value of every group, in order of first appearance; intervals only for groups of
    ``at_least`` values.

    blocks: the block (window, or stretch of text) that each token belongs to. Blocks are what is
    independent: the interval is Student's t for the ratio of the blocks' sums to their counts, over
    the blocks that hold the group (Cochran, Sampling Techniques, chapter 6).
    """
    names = list(dict.fromkeys(groups))
    if not names:
        return []
    group = np.array([names.index(g) for g in groups])
    _, block = np.unique(np.asarray(blocks), return_inverse=True)
    C, K = int(block.max()) + 1, len(names)
    sum_CK, count_CK = np.zeros((C, K)), np.zeros((C, K))
    np.add.at(sum_CK, (block, group), np.asarray(values, dtype=float))
    np.add.at(count_CK, (block, group), 1)
    counts = count_CK.sum(0)
    means, holds = sum_CK.sum(0) / counts, (count_CK > 0).sum(0)
    squares = np.square(sum_CK - means * count_CK).sum(0)  # 0 from blocks without the group
    found = []
    for name, mean, count, c, square in zip(names, means, counts, holds, squares, strict=True):
        low = high = None
        if c > 1 and count >= at_least:
            half = _t_quantile(c - 1) * math.sqrt(c / (c - 1) * square) / count
            low, high = float(mean - half), float(mean + half)
        found.append(GroupMean(group=name, count=int(count), mean=float(mean), low=low, high=high))
    return found
