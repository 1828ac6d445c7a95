"""Documents, tokenizers and batches."""

import json

import numpy as np
import pytest
import torch

from mor.data.python_docs import python_documents, without_repeats
from mor.data.sources import read_documents
from mor.data.stream import (
    DataConfig,
    DataState,
    Document,
    Part,
    TokenData,
    load_corpus,
    split_documents,
)
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


def test_the_default_corpus_is_pythons_own_prose(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    documents = python_documents()
    names = {d.name for d in documents}
    assert len(names) == len(documents) > 300
    assert {"topic:assert", "module:argparse", "module:math"} <= names
    assert sum(len(d.text) for d in documents) > 1_000_000
    assert len(list((tmp_path / "mor").iterdir())) == 1
    assert python_documents() == documents, "the kept copy is the same"


def test_no_paragraph_stands_in_two_documents():
    long = "a paragraph that is certainly longer than forty characters"
    documents = [
        Document("a", f"{long}\n\nshort"),
        Document("b", f"short\n\n{long}\n\nown"),
        Document("c", long),
    ]
    assert without_repeats(documents) == [
        Document("a", f"{long}\n\nshort"),
        Document("b", "short\n\nown"),
    ]


def test_validation_documents_stay_when_others_are_added():
    documents = [Document(f"doc-{i}", f"text {i}") for i in range(200)]
    train, validation = split_documents(documents, 0.1)
    assert 5 < len(validation) < 40 and not set(train) & set(validation)
    more = [Document(f"extra-{i}", "x") for i in range(50)]
    assert set(validation) <= set(split_documents(documents + more, 0.1)[1])
    with pytest.raises(ValueError, match="single document"):
        split_documents(documents[:1], 0.1)


def test_batches_are_a_function_of_seed_and_position():
    data = TokenData([Part(np.arange(101), np.array([101]))], 1, 100)
    stream = data.batches(3, 10, seed=1, state=DataState())
    seen = [next(stream) for _ in range(9)]
    again = data.batches(3, 10, seed=1, state=seen[3][1])
    for batch, state in seen[4:]:
        other, other_state = next(again)
        assert torch.equal(batch.tokens_BT, other.tokens_BT) and state == other_state
    rows = torch.cat([batch.tokens_BT for batch, _ in seen])
    assert torch.equal(rows[:, 1:], torch.cat([batch.targets_BT for batch, _ in seen])[:, :-1])
    assert sorted(rows[:10, 0].tolist()) == list(range(0, 100, 10)), (
        "an epoch visits every window once"
    )
    assert rows[:10, 0].tolist() != rows[10:20, 0].tolist(), "epochs differ in order"


def test_files_of_text_and_jsonl(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(f"paragraph {i} " + "word " * 100 for i in range(50)))
    documents = read_documents(text)
    assert len(documents) > 3
    assert "".join(d.text for d in documents).count("paragraph") == 50
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"body": f"hello {i}", "id": i}) + "\n" for i in range(5)))
    assert [d.text for d in read_documents(lines, "body")] == [f"hello {i}" for i in range(5)]
    with pytest.raises(ValueError, match=r"a.jsonl:1 has no field 'text'; it has body, id"):
        read_documents(lines)
    lines.write_text("{broken\n")
    with pytest.raises(
        ValueError, match=r"holds no text; 1 broken record.*a.jsonl:1 is not valid JSON"
    ):
        read_documents(lines)
    with pytest.raises(ValueError, match=r"give a .txt, .jsonl"):
        read_documents(tmp_path / "missing.txt")


def test_corpus_counts_bytes_and_closes_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"é{i}"}) + "\n" for i in range(40)))
    corpus = load_corpus(DataConfig(path=str(path), tokenizer="bytes", validation_share=0.2))
    for part in (corpus.train, corpus.validation):
        ends = int((part.tokens(0, len(part)) == corpus.tokenizer.end_of_text_id).sum())
        assert ends == part.num_documents and len(part) == part.num_bytes + part.num_documents
    assert corpus.train.num_documents + corpus.validation.num_documents == 40
