"""Intervals and paired differences."""

import numpy as np
import pytest

from mor.statistics import group_means, paired


@pytest.mark.parametrize(("blocks", "rare"), [(3, False), (8, False), (40, False), (16, True)])
def test_intervals_cover_the_truth_as_often_as_they_say_even_when_tokens_of_a_block_are_alike(
    blocks, rare
):
    """Blocks of 8 tokens that hardly differ; rare: the group has two tokens in one block and one in
    another."""
    generator, covered, places = np.random.default_rng(1), 0, np.repeat(np.arange(blocks), 8)
    groups = np.where(np.isin(np.arange(len(places)), [3, 5, 40]) | (not rare), "a", "b").tolist()
    for _ in range(400):
        values = generator.normal(0, 1, blocks)[places] + generator.normal(0, 0.1, len(places))
        mean = next(found for found in group_means(values, groups, places) if found.group == "a")
        covered += mean.low <= 0 <= mean.high
    assert 366 <= covered <= 393  # 95% nominal, 380, within three standard deviations


def test_a_group_in_one_block_has_a_mean_and_no_interval():
    # Sums 1 and 8 of 1 and 2 values: mean 3, residues -2 and 2, so the deviation is sqrt(2 / 1 * 8)
    # / 3 = 4 / 3.
    found = group_means([1.0, 3.0, 5.0, 5.0], ["a", "a", "a", "b"], [0, 1, 1, 1])
    half = 12.706205 * 4 / 3
    assert (found[0].mean, found[0].count) == (3.0, 3)
    assert (found[0].low, found[0].high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    assert (found[1].mean, found[1].low, found[1].high) == (5.0, None, None)
    assert group_means([], [], []) == []


def test_paired_differences_and_their_intervals():
    # Differences 0.1, 0.2, 0.3: mean 0.2, sd 0.1, and Student's t for 2 degrees of freedom is
    # 4.303.
    found = paired({0: 1.1, 1: 2.2, 2: 3.3, 9: 7.0}, {0: 1.0, 1: 2.0, 2: 3.0, 8: 1.0})
    half = 4.302653 * 0.1 / 3**0.5
    assert found.count == 3 and abs(found.mean - 0.2) < 1e-9
    assert abs(found.low - (0.2 - half)) < 1e-6 and abs(found.high - (0.2 + half)) < 1e-6
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert paired({0: 1.5}, {0: 1.0}).low is None
