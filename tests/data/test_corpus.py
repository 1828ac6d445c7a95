"""Corpora: what they hold, what tells them apart, and what contradicts them."""

import json
from dataclasses import replace

import pytest

from mor.data.config import DataConfig
from mor.data.corpus import Corpus, load_corpus, load_tokens, split_documents, what_changed
from mor.data.shards import PrepareConfig, prepare
from mor.data.sources import Document
from mor.data.tokenizer import byte_tokenizer
from tests.data.documents import TEXTS, write_jsonl


def test_validation_documents_hardly_change_when_others_are_added():
    documents = [Document(f"doc-{i}", f"text {i}") for i in range(200)]
    train, validation = split_documents(documents, 0.1)
    assert len(validation) in (19, 20, 21) and not set(train) & set(validation)
    more = [Document(f"extra-{i}", f"text {i}") for i in range(50)]
    assert len(set(validation) - set(split_documents(documents + more, 0.1)[1])) < 4
    with pytest.raises(ValueError, match="single document"):
        split_documents(documents[:1], 0.1)


def test_corpus_counts_bytes_and_closes_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"é{i}"}) + "\n" for i in range(40)))
    corpus = load_corpus(DataConfig(path=str(path), tokenizer="bytes", validation_share=0.2))
    for part in (corpus.train, corpus.validation):
        ends = int((part.tokens(0, len(part)) == corpus.tokenizer.end_of_text_id).sum())
        assert ends == part.num_documents and len(part) == part.num_bytes + part.num_documents
    assert corpus.train.num_documents + corpus.validation.num_documents == 40


# Reading


# Fingerprints


def test_a_fingerprint_tells_corpora_apart_and_nothing_else(tmp_path, monkeypatch):
    def corpus(name, texts, **settings):
        source = write_jsonl(tmp_path / name, texts)
        return load_corpus(DataConfig(path=source, tokenizer="bytes", **settings)).fingerprint()

    (tmp_path / "elsewhere").mkdir()
    first = corpus("a.jsonl", TEXTS)
    assert first == corpus("elsewhere/a.jsonl", TEXTS) and not what_changed(first, first)
    assert first["train.documents"] + first["validation.documents"] == len(TEXTS)
    other = corpus("a.jsonl", [t.replace("square", "SQUARE") for t in TEXTS])
    assert what_changed(first, other) == (
        "the text is another of the same length, or in another order"
    )
    shared_out = corpus("a.jsonl", TEXTS, validation_share=0.5)
    assert f"train.documents was {first['train.documents']}, is " in what_changed(first, shared_out)
    hops = [load_corpus(DataConfig(path=f"task:pointer-chasing?hops={n}")) for n in (3, 4)]
    assert "hops=3" in what_changed(*(c.fingerprint() for c in hops))


def test_the_fingerprint_of_shards_is_the_one_of_their_bytes(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    config = PrepareConfig(tokenizer="bytes", workers=1, validation_share=0.2)
    prepare([source], tmp_path / "out", config)
    recorded = load_corpus(DataConfig(path=str(tmp_path / "out")))
    read = [
        replace(data, parts=[part._replace(recorded="") for part in data.parts])
        for data in (recorded.train, recorded.validation)
    ]
    assert Corpus(recorded.tokenizer, *read).fingerprint() == recorded.fingerprint()


def test_data_is_found_from_another_working_folder(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    here = DataConfig(path="a.jsonl", validation_path="task:x", tokenizer="bytes").located()
    assert here.path == str(tmp_path / "a.jsonl")
    assert (here.validation_path, here.tokenizer) == ("task:x", "bytes")


# Settings that contradict the data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contradictions")
    source = write_jsonl(folder / "a.jsonl")
    for name, settings in (("bytes", {}), ("bpe", {"vocab_size": 300})):
        config = PrepareConfig(tokenizer=name, workers=1, validation_share=0.2, **settings)
        prepare([source], folder / name, config)
    return folder


@pytest.mark.parametrize(
    ("data", "settings", "named"),
    [
        ("bytes", {"tokenizer": "bpe"}, r"data.tokenizer='bpe', but .* prepared with 'bytes'"),
        ("bpe", {"tokenizer": "bytes"}, r"data.tokenizer='bytes', but .* with 'bpe 300 50'"),
        ("bytes", {"vocab_size": 2048}, r"data.vocab_size=2048, but the tokenizer of .* has 257"),
        ("a.jsonl", {"tokenizer": "bytes", "vocab_size": 300}, r"leave it out with data.tokenizer"),
        ("task:pointer-chasing", {"vocab_size": 300}, r"leave out data.vocab_size"),
        ("task:pointer-chasing", {"validation_path": "x"}, r"leave out data.validation_path"),
    ],
)
def test_a_contradiction_is_an_error(data, settings, named, prepared):
    path = data if data.startswith("task:") else str(prepared / data)
    with pytest.raises(ValueError, match=named):
        load_corpus(DataConfig(path=path, **settings))


def test_what_agrees_with_prepared_data_is_taken_and_old_runs_go_on(prepared, recwarn):
    for data, settings in (
        ("bytes", {"tokenizer": "bytes", "vocab_size": 257}),
        ("bpe", {"tokenizer": "bpe", "vocab_size": 300}),
        ("bpe", {"tokenizer": str(prepared / "bpe")}),
    ):
        config = DataConfig(path=str(prepared / data), **settings)
        tokenizer = load_corpus(config).tokenizer
        old = replace(config, tokenizer="bpe", vocab_size=2048)  # what mor 0.1.0 kept of a run
        assert load_corpus(old, tokenizer).train.num_documents > 50
    assert not list(recwarn)


def test_settings_without_effect_are_named(prepared):
    cases = {
        "validation_share": DataConfig(path=str(prepared / "bytes"), validation_share=0.3),
        "text_field": DataConfig(path="task:pointer-chasing", text_field="body"),
    }
    for name, config in cases.items():
        with pytest.warns(UserWarning, match=f"data.{name} has no effect on {config.path}"):
            load_corpus(config)


# Damaged shards


@pytest.mark.parametrize("recorded", [True, False])
def test_damaged_shards_are_named_before_training(recorded, tmp_path):
    source, out = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    config = PrepareConfig(tokenizer="bytes", workers=1, validation_share=0.2)
    manifest = prepare([source], out, config)
    if not recorded:  # as mor 0.1.0 wrote it
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                del shard["sha256"]
        (out / "manifest.json").write_text(json.dumps(manifest))
    file, ends = out / "train-00000.bin", out / "train-00000.ends.npy"
    whole, whole_ends = file.read_bytes(), ends.read_bytes()
    load_corpus(DataConfig(path=str(out)))
    damages = [
        (file, b"\xff\xff" + whole[2:], r"it has the id 65535, the tokenizer 0..256"),
        (ends, whole_ends[:40], r"train-00000.bin is damaged"),
        (ends, whole_ends[:-8] + b"\0" * 8, r"do not end at its"),
    ]
    if recorded:
        damages.append((file, b"\x01\x00" + whole[2:], "its checksum has changed"))
    for place, content, named in damages:
        place.write_bytes(content)
        with pytest.raises(ValueError, match=named):
            load_corpus(DataConfig(path=str(out)))
        place.write_bytes(whole if place == file else whole_ends)
    load_corpus(DataConfig(path=str(out)))


def test_shards_beyond_the_first_are_checked_when_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("mor.data.corpus.CHECKED_AT_ONCE", 1)
    source, out = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    config = PrepareConfig(tokenizer="bytes", workers=1, chunk_megabytes=0.002)
    prepare([source], out, config)
    second = out / "train-00001.bin"
    second.write_bytes(b"\xff\xff" + second.read_bytes()[2:])
    data = load_tokens(out, byte_tokenizer())
    first = data.parts[0].num_tokens
    assert len(data.tokens(0, first)) == first
    with pytest.raises(ValueError, match=r"train-00001.bin is damaged.*65535"):
        data.tokens(0, first + 1)


def test_validation_text_is_not_training_text(tmp_path):
    texts = [f"Text {i} is this one. " * (i % 7 + 1) for i in range(60)]
    (tmp_path / "all").mkdir()
    for name, some in {"all/a": texts, "all/b": texts[:9], "c": texts[:9], "d": texts[20:]}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", some)
    others = [*texts[:10], *(text.upper() for text in texts[10:40])]
    write_jsonl(tmp_path / "others.jsonl", others)
    prepare([str(tmp_path / "d.jsonl")], tmp_path / "e", PrepareConfig(tokenizer="bytes"))

    def load(path, validation_path):
        places = {"path": str(tmp_path / path), "validation_path": str(tmp_path / validation_path)}
        return load_corpus(DataConfig(**places, tokenizer="bytes"))

    for same in (
        ("d.jsonl", "d.jsonl"),
        ("all", "all/b.jsonl"),
        ("all", "c.jsonl"),
        ("all", "e"),
        ("e", "d.jsonl"),
        ("e", "e"),
    ):
        with pytest.raises(ValueError, match=f"all documents of .*{same[1]} are in the training"):
            load(*same)
    with pytest.warns(UserWarning, match="10 of the 40 longest documents of .*others.jsonl are in"):
        load("all", "others.jsonl")
    assert load("c.jsonl", "d.jsonl").validation.num_documents == 40
