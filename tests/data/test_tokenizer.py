"""Tokenizers: any text comes back."""

import pytest

from mor.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe

TEXT = "Recursion, n.: see recursion. Größe ☃ 日本語\n\n\tdef f(x): return x\n"


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe([TEXT] * 5, 300)])
def test_tokenizers_round_trip_any_text_and_load_in_transformers(make, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = make()
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) < tokenizer.vocab_size and tokenizer.end_of_text_id < tokenizer.vocab_size
    same_ids, pieces_of_text = tokenizer.encode_with_pieces(TEXT)
    assert same_ids == ids and tokenizer.encode_with_pieces("") == ([], [])
    for pieces in (pieces_of_text, tokenizer.pieces(ids)):
        assert "".join(pieces) == TEXT and len(pieces) == len(ids)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode(TEXT) == ids
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == ids and theirs.eos_token_id == tokenizer.end_of_text_id


def test_bytes_cost_one_token_each_and_bpe_fewer():
    assert len(byte_tokenizer().encode(TEXT)) == len(TEXT.encode())
    assert len(train_bpe([TEXT] * 5, 300).encode(TEXT)) < len(TEXT.encode())
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe([TEXT], 200)
