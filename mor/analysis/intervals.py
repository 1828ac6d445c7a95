"""95% intervals: of means over a few runs, and of groups of tokens, where neighbours are not independent.

T tokens · K groups · C blocks · S samples
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
    """low, high: Student's t interval of the mean of ``count`` independent samples; None where there is one only."""

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
    return mean_interval([values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())])


def _t_quantile(freedom: int) -> float:
    try:
        from scipy.stats import t
    except ImportError:
        raise ImportError('intervals need SciPy: pip install "mixture-of-recursions[study]"') from None
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def bootstrap_bounds(drawn: NDArray[np.float64]) -> tuple[float, float]:
    """Interval of a resampled figure. A resample without one (NaN) may lie anywhere: it counts as below and as above
    all others. A bound that such resamples, or infinite ones, reach is NaN."""
    tail = (1 - CONFIDENCE) / 2
    with np.errstate(invalid="ignore"):  # between two infinite resamples
        low = np.quantile(np.nan_to_num(drawn, nan=-np.inf, posinf=np.inf, neginf=-np.inf), tail)
        high = np.quantile(np.nan_to_num(drawn, nan=np.inf, posinf=np.inf, neginf=-np.inf), 1 - tail)
    return float(low) if math.isfinite(low) else math.nan, float(high) if math.isfinite(high) else math.nan


@dataclass(frozen=True, kw_only=True)
class GroupMean:
    """low, high: 95% interval, None where all tokens of the group lie in a single block."""

    group: str
    count: int
    mean: float
    low: float | None
    high: float | None


def group_means(
    values: Sequence[float], groups: Sequence[str], blocks: Sequence[int], *, samples: int = 1000, seed: int = 0
) -> list[GroupMean]:
    """Mean value of every group, in order of first appearance, with a bootstrap interval over whole blocks.

    blocks: the block (window, or stretch of text) that each token belongs to; blocks are what is drawn anew.
    """
    names = list(dict.fromkeys(groups))
    if not names:
        return []
    group_T = np.array([names.index(g) for g in groups])
    _, block_T = np.unique(np.asarray(blocks), return_inverse=True)
    C, K = int(block_T.max()) + 1, len(names)
    sum_CK, count_CK = np.zeros((C, K)), np.zeros((C, K))
    np.add.at(sum_CK, (block_T, group_T), np.asarray(values, dtype=float))
    np.add.at(count_CK, (block_T, group_T), 1)
    times_SC = np.random.default_rng(seed).multinomial(C, np.full(C, 1 / C), size=samples)
    with np.errstate(invalid="ignore"):
        mean_SK = (times_SC @ sum_CK) / (times_SC @ count_CK)  # NaN where a sample lacks the group
    found = []
    for k, name in enumerate(names):
        count, several = int(count_CK[:, k].sum()), (count_CK[:, k] > 0).sum() > 1
        low, high = np.nanpercentile(mean_SK[:, k], [2.5, 97.5]).tolist() if several else (None, None)
        mean = float(sum_CK[:, k].sum()) / count
        found.append(GroupMean(group=name, count=count, mean=mean, low=low, high=high))
    return found
