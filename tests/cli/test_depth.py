"""Depths as people write them."""

import pytest

from mor.cli.depth import parse_depth


def test_numbers_shares_and_full_are_depths():
    written = [None, "full", "2.2", "3", "55%", "150%"]
    assert [parse_depth(text, 4) for text in written] == [None, "full", 2.2, 3.0, 2.2, 6.0]


@pytest.mark.parametrize("text", ["half", "%", "2,5", ""])
def test_other_words_are_refused(text):
    with pytest.raises(ValueError, match="--depth takes a mean depth"):
        parse_depth(text, 4)
