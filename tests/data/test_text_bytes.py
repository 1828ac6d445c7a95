"""Bytes of text by token: together those of a document are the document's, whatever tokenizer."""

import random

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mor.data.text_bytes import text_bytes
from mor.data.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, train_bpe

ALPHABET = "ab \n.éß日本🙂"  # 1 to 4 bytes each
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def random_text(seed, length=60):
    draw = random.Random(seed)
    return "".join(draw.choice(ALPHABET) for _ in range(draw.randint(1, length)))


def finished(backend):
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def sentence_piece(prefix):
    """A BPE over characters, spaces written as ▁, bytes for all that it does not know."""
    words = ["▁", "a", "b", "▁a", "ab", "▁ab", "é", "日", "."]
    vocab = {name: i for i, name in enumerate([*BYTES, *words])}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    first = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return finished(backend)


def with_prefix_space():
    backend = byte_tokenizer().backend
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    return finished(backend)


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "byte-level BPE": lambda: train_bpe([random_text(i, 400) for i in range(40)], 500),
    "SentencePiece, a space before documents": lambda: sentence_piece(True),
    "SentencePiece": lambda: sentence_piece(False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokens_of_documents_have_the_bytes_of_the_documents(name):
    tokenizer = TOKENIZERS[name]()
    texts = [random_text(seed) for seed in range(30)]
    stream = [tokenizer.end_of_text_id]
    for text in texts:
        stream += [*tokenizer.encode(text), tokenizer.end_of_text_id]
    before, after = torch.tensor(stream[:-1])[None], torch.tensor(stream[1:])[None]
    assert tokenizer.text_bytes.of(before, after) == sum(len(text.encode()) for text in texts)
    sizes = set(tokenizer.text_bytes.inside[stream].tolist())
    assert len(sizes) > 3 or name == "bytes", "or this test could not fail"


def test_a_space_that_the_tokenizer_adds_is_no_part_of_the_document():
    found = with_prefix_space()
    ids = [found.end_of_text_id, *found.encode("ab"), *found.encode("ab")]
    before, after = torch.tensor(ids[:-1])[None], torch.tensor(ids[1:])[None]
    assert found.text_bytes.of(before, after) == len("ab") + len(" ab")


def test_special_tokens_and_answers_that_are_none_have_no_bytes():
    found = text_bytes(byte_tokenizer().backend, 256)
    assert found.inside[256] == found.first[256] == 0 and (found.inside[:256] == 1).all()
    assert found.of(torch.tensor([[1, 2, 3]]), torch.tensor([[5, -100, 256]])) == 1


def test_ids_with_gaps_have_a_place_each():
    backend = tokenizers.Tokenizer(models.WordLevel({"one": 2, "thirteen": 9}, unk_token="one"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    found = text_bytes(backend, 2)
    assert len(found.inside) == 10 and np.flatnonzero(found.inside).tolist() == [9]


def test_the_unknown_token_has_no_bytes_whether_it_is_marked_special_or_not():
    words = models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>")
    pieces = models.Unigram([("<unk>", 0.0), ("the", -1.0)], unk_id=0)
    for model in (words, pieces):
        found = finished(tokenizers.Tokenizer(model)).text_bytes
        assert found.first[:2].tolist() == found.visible[:2].tolist() == [0, 3]


def test_white_space_is_told_from_the_rest():
    tokenizer = byte_tokenizer()
    text = " a\tb\u00a0日\n"
    seen = len("ab\u00a0日".encode())
    assert tokenizer.text_bytes.of_document(tokenizer.encode(text)) == (seen, 3)
    piece = sentence_piece(True)
    assert piece.text_bytes.of_document(piece.encode(" ab x\n")) == (3, 3)
