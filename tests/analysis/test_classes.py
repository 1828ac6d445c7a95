"""Classes of tokens: kinds, places and frequencies."""

import pytest

from mor.analysis.classes import frequency_groups, kinds, place_groups
from mor.data.tokenizer import byte_tokenizer, train_bpe

TEXT = "Größe: 12 naïve cats—日本 ate it.\n\n  The end, isn't it?"


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT * 3, "the cat sat on the mat, naïvely"], 290)


def test_kinds_of_tokens():
    tokenizer = byte_tokenizer()
    pieces = ["The", " cat", "s", ",", " 12", "3", "\n", " don", "'", "t", "", "é", "日"]
    assert kinds(tokenizer, [0] * len(pieces), pieces) == [
        *(
            "word start",
            "word start",
            "word continuation",
            "punctuation",
            "digit",
            "digit",
            "space",
            "word start",
        ),
        *(
            "punctuation",
            "word start",
            "part of a character",
            "word continuation",
            "word continuation",
        ),
    ]
    assert kinds(tokenizer, [tokenizer.end_of_text_id], [""]) == ["special"]


def test_groups_by_place_and_frequency():
    assert place_groups([0, 3, 4, 7]) == ["0–1", "2–3", "4–5", "6–7"]
    assert frequency_groups([1, 1, 5, 5, 9, 9]) == [*["rare (1–5)"] * 4, *["middle (9)"] * 2]
