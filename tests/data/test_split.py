"""Which documents are held out: as many bytes as were asked for."""

import json

import pytest

from mor.data.config import DataConfig
from mor.data.corpus import load_corpus
from mor.data.shards import PrepareConfig, prepare
from mor.data.split import Divided, draw, held_out, held_out_documents

# One document in ten holds nearly all of the text.
SKEWED = ["word " * (2000 if i % 10 == 3 else 20) for i in range(400)]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("chunks", [1, 7, 400])
def test_the_share_of_bytes_is_the_one_asked_for_in_any_chunks(share, chunks):
    names, sizes = [f"d:{i}" for i in range(len(SKEWED))], [len(text) for text in SKEWED]
    divided, size, held = Divided(), -(-len(SKEWED) // chunks), 0
    for start in range(0, len(SKEWED), size):
        part = slice(start, start + size)
        chosen, divided = held_out(names[part], sizes[part], share, divided)
        held += sum(s for s, is_held in zip(sizes[part], chosen, strict=True) if is_held)
    assert divided == (sum(sizes), held) and not divided.miss(share)


def test_text_and_prepared_data_hold_out_the_same_documents(tmp_path, recwarn):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in SKEWED))
    config = PrepareConfig(tokenizer="bytes", workers=1, validation_share=0.02)
    prepare([str(source)], tmp_path / "out", config)
    text = load_corpus(DataConfig(path=str(source), tokenizer="bytes", validation_share=0.02))
    shards = load_corpus(DataConfig(path=str(tmp_path / "out")))
    assert text.validation.num_bytes == shards.validation.num_bytes
    share = text.validation.num_bytes / sum(map(len, SKEWED))
    assert share == pytest.approx(0.02, rel=0.05)
    assert not [w for w in recwarn if "held out" in str(w.message)]


def test_a_share_of_the_documents_is_the_one_that_runs_of_the_first_version_have():
    names, share = [f"d:{i}" for i in range(50)], 0.1
    chosen = held_out_documents(names, share)
    assert [draw(name) < share for name in names] == chosen and any(chosen)
    assert held_out_documents(["a", "b"], 0.001).count(True) == 1
    assert held_out_documents(["a", "b"], 0.999).count(True) == 1


def test_a_share_that_documents_do_not_allow_is_named(tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    texts = ["x" * 100_000, *["y" * 100] * 5]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.warns(UserWarning, match=r"0.50% of the text is held out .* not the 2.00% asked"):
        corpus = load_corpus(DataConfig(path=str(source), tokenizer="bytes", validation_share=0.02))
    assert corpus.validation.num_documents == 5 and corpus.train.num_documents == 1
    config = PrepareConfig(tokenizer="bytes", workers=1, validation_share=0.02)
    found = prepare([str(source)], tmp_path / "out", config)
    assert found["splits"]["validation"]["bytes"] == 500
    assert "warning: 0.50% of the text is held out" in capsys.readouterr().out
    assert held_out(["a", "b"], [5, 5], 0.01)[0].count(True) == 1, "each side gets one"
    assert held_out(["a", "b"], [5, 5], 0.99)[0].count(True) == 1
    assert held_out(["a"], [5], 0.5) == ([False], (5, 0))
