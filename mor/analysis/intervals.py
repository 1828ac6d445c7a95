"""Means of groups with intervals that do not take neighbouring tokens for independent.

T tokens · K groups · C blocks · S samples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
