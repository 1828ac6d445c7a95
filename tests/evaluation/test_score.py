"""The sums behind NLL, perplexity and bits per byte."""

import math

import pytest

from mor.evaluation.score import Score


def test_parts_of_different_sizes_add_up_to_the_whole():
    few, many = Score(nats=6.0, tokens=2, bytes=3), Score(nats=2.0, tokens=6, bytes=13)
    whole = few + many
    assert whole.nll == 1.0 != (few.nll + many.nll) / 2
    assert whole.perplexity == pytest.approx(math.e)
    assert whole.bits_per_byte == pytest.approx(8 / math.log(2) / 16)
    assert sum([few, many], Score()) == whole


def test_what_has_no_meaning_is_not_a_number_made_up():
    answers = Score(nats=3.0, tokens=2)
    assert answers.bits_per_byte is None and answers.in_words == "1.500 nats per token"
    assert Score(nats=3.0, tokens=2, bytes=4).in_words == "1.082 bits/byte"
    assert Score(nats=1e6, tokens=1).perplexity == math.inf
    with pytest.raises(ValueError, match="no token was predicted"):
        _ = Score().nll
