"""A document has the same ids whatever it is read from."""

import gzip
import json
import random

import pytest

from mor.data.config import DataConfig
from mor.data.corpus import load_corpus, load_tokens
from mor.data.shards import PrepareConfig, prepare
from mor.data.sources import find_sources
from mor.data.stream import DataState
from mor.data.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

PARTS = [
    "word",
    " ",
    "  ",
    "é",
    "日本",
    "🙂",
    "\t",
    "e\u0301",
    "\u00a0",
    "123",
    "'s",
    "\u200b",
    "a" * 300,
]


def documents(seed):
    """Documents that begin and end with something, as a text file cuts off the line breaks."""
    draw = random.Random(seed)
    parts = [*PARTS, "\n", "\n\n", END_OF_TEXT]
    return [
        draw.choice(PARTS[3:]) + "".join(draw.choices(parts, k=draw.randint(0, 40))) + "."
        for _ in range(12)
    ]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """With batch settings in its file, which must not act on documents."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_bpe(PARTS * 3, 300)
    tokenizer.backend.enable_truncation(3)
    tokenizer.backend.enable_padding(length=700)
    tokenizer.save(folder)
    assert '"max_length":3' in (folder / "tokenizer.json").read_text().replace(" ", "")
    return folder


def write_all(folder, texts):
    """The same documents in files of every kind; the text files hold one each."""
    import pyarrow as arrow
    import zstandard
    from pyarrow import parquet

    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    parquet.write_table(arrow.table({"text": texts}), folder / "d.parquet", row_group_size=5)
    (folder / "e").mkdir()
    for i, text in enumerate(texts):
        (folder / "e" / f"{i:02d}.txt").write_bytes(text.encode() + b"\n")
    return ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e"]


@pytest.mark.parametrize("seed", range(3))
def test_every_kind_of_file_gives_the_ids_that_the_tokenizer_gives(
    seed, tokenizer_folder, tmp_path
):
    tokenizer, texts = Tokenizer.load(tokenizer_folder), documents(seed)
    end = [tokenizer.end_of_text_id]
    expected = [i for text in texts for i in tokenizer.encode_documents([text])[0] + end]
    assert tokenizer.decode(expected) == "".join(texts)
    for name in write_all(tmp_path, texts):
        sources, _ = find_sources([tmp_path / name])
        assert [record.text for source in sources for record, _ in source.read()] == texts, name
        data = load_tokens(tmp_path / name, tokenizer)
        assert data.tokens(0, len(data)).tolist() == expected, name


def test_prepared_data_have_the_same_ids_in_any_chunks(tokenizer_folder, tmp_path):
    tokenizer, texts = Tokenizer.load(tokenizer_folder), documents(7)
    names = write_all(tmp_path, texts)
    config = PrepareConfig(tokenizer=str(tokenizer_folder), workers=1, chunk_megabytes=0.0005)
    prepare([str(tmp_path / name) for name in names], tmp_path / "out", config)
    data = load_tokens(tmp_path / "out", tokenizer)
    once = load_tokens(tmp_path / "a.jsonl", tokenizer)
    expected = once.tokens(0, len(once)).tolist() * len(names)
    assert data.tokens(0, len(data)).tolist() == expected
    (tmp_path / "other.txt").write_text("Other text.")
    corpus = load_corpus(
        DataConfig(
            path=str(tmp_path / "out"),
            validation_path=str(tmp_path / "other.txt"),
            tokenizer=str(tokenizer_folder),
        )
    )
    batch, _ = next(corpus.train.batches(1, len(data) - 1, seed=0, state=DataState()))
    assert batch.tokens_BT[0].tolist() == expected[:-1]
