"""Text without white space, in the training of a BPE."""

import pytest

from mor.data.long_pieces import LONGEST_PIECE, USED_CHARACTERS, in_short_pieces
from mor.data.tokenizer import train_bpe

ORDINARY = ["def f(x): return x\n" * 40, "日本語。 Größe " * 50, "a" * (LONGEST_PIECE - 1)]


def test_ordinary_text_is_left_as_it_is(recwarn):
    assert list(in_short_pieces((str(i), text) for i, text in enumerate(ORDINARY))) == ORDINARY
    assert not list(recwarn)


@pytest.mark.parametrize("run", ["ab", "日本", "7", " ", "-_", "\n"])
def test_long_pieces_are_cut_and_nothing_else_is_lost(run):
    text = "x " + run * 500 + " y"
    with pytest.warns(UserWarning, match=r"1 document\(s\), such as one, have"):
        pieces = list(in_short_pieces([("one", text), ("two", "z")]))
    assert "".join(pieces) == text + "z"
    assert max(map(len, pieces)) <= LONGEST_PIECE + len("x ") and len(pieces) >= 4


def test_a_document_that_is_one_piece_trains_on_a_part_and_is_encoded_whole():
    text = "acgt" * (USED_CHARACTERS // 2)
    with pytest.warns(UserWarning, match=r"such as text 1, .* left out 499,936 characters"):
        tokenizer = train_bpe([text], 300)
    ids = tokenizer.encode_documents([text])[0]
    assert tokenizer.decode(ids) == text and len(ids) < len(text) / 8
