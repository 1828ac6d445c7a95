"""Kinds of files, and what is wrong in them."""

import gzip
import os

import pytest

from mor.data.shards import PrepareConfig, prepare
from mor.data.sources import find_sources
from tests.data.documents import TEXTS, write_jsonl


def test_a_missing_field_lists_those_there_are(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS[:3], title="x")
    wrong = PrepareConfig(tokenizer="bytes", text_field="body", workers=1)
    with pytest.raises(
        ValueError, match=r"a.jsonl:1 has no field 'body'; it has text, title: choose one with"
    ):
        prepare([source], tmp_path / "out", wrong)
    assert not list((tmp_path / "out").glob("*.bin"))
    right = PrepareConfig(tokenizer="bytes", text_field="title", workers=1)
    assert prepare([source], tmp_path / "out", right)["splits"]["train"]["bytes"] == 3, (
        "the mistake left no trace"
    )
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="the sources hold no text: 1 empty"):
        prepare(
            [str(tmp_path / "b.jsonl")],
            tmp_path / "out2",
            PrepareConfig(tokenizer="bytes", workers=1),
        )


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    import pyarrow as arrow
    import zstandard
    from pyarrow import parquet

    plain = tmp_path / "a.jsonl"
    write_jsonl(plain)
    raw = plain.read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    frames = [zstandard.ZstdCompressor().compress(half) for half in (raw[:1000], raw[1000:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    parquet.write_table(
        arrow.table({"text": TEXTS, "id": range(len(TEXTS))}),
        tmp_path / "d.parquet",
        row_group_size=40,
    )

    def texts(name, skip=0):
        (source,), _ = find_sources([tmp_path / name])
        return [record.text for record, _ in source.read(skip)]

    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        assert texts(name) == TEXTS and texts(name, 90) == TEXTS[90:], name
    parquet.write_table(arrow.table({"body": TEXTS}), tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=r"e.parquet has no field 'text'; it has body"):
        texts("e.parquet")


def test_all_forms_of_text_in_a_table_are_read_and_nulls_are_counted(tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    values = ["a", None, "é"]
    columns = {
        "string": arrow.array(values),
        "large": arrow.array(values, arrow.large_string()),
        "view": arrow.array(values, arrow.string_view()),
        "dictionary": arrow.array(values).dictionary_encode(),
        "nothing": arrow.nulls(3),
    }
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    for field in columns:
        (source,), _ = find_sources([tmp_path / "a.parquet"], text_field=field)
        null, records = f"has null in field {field!r}", [record for record, _ in source.read()]
        expected = [("", null)] * 3 if field == "nothing" else [("a", ""), ("", null), ("é", "")]
        assert [record[1:] for record in records] == expected
    everything = PrepareConfig(tokenizer="bytes", workers=1, text_field="nothing")
    with pytest.raises(
        ValueError, match=r"no text: 0 empty documents, 3 broken .* a.parquet:1 has"
    ):
        prepare([str(tmp_path / "a.parquet")], tmp_path / "out", everything)


def test_a_later_record_without_the_field_is_broken_and_stops_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"body": "y"}\n{"text": "z"}\n')
    found = prepare(
        [str(tmp_path / "a.jsonl")], tmp_path / "out", PrepareConfig(tokenizer="bytes", workers=1)
    )
    assert found["splits"]["train"]["documents"] == 2
    assert found["problems"] == ["a.jsonl:2 has no field 'text'; it has body"]


def test_files_whose_content_is_of_another_kind_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    (tmp_path / "b.txt").write_bytes(b"PAR1....PAR1")
    (tmp_path / "c.txt").write_text("text", encoding="utf-16")
    for name, kind in (("a.jsonl", ".gz"), ("b.txt", ".parquet"), ("c.txt", "UTF-16")):
        (source,), _ = find_sources([tmp_path / name])
        with pytest.raises(ValueError, match=rf"{name} has the content of a {kind} file"):
            list(source.read())


def test_lines_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbf  good\r\n\xff\nn\0ul\n also good\n\n")
    (source,), _ = find_sources([tmp_path / "a.TXT"])
    records = [record for record, _ in source.read()]
    assert [r.text for r in records if not r.problem] == ["  good\n also good"]
    assert [f"{r.name} {r.problem}" for r in records if r.problem] == [
        "a.TXT, line 2, is a line that is not valid UTF-8: invalid start byte at byte 1",
        "a.TXT, line 3, is a line with NUL bytes, no text",
    ]


def test_a_wrong_file_is_found_before_any_work(tmp_path):
    first, last = write_jsonl(tmp_path / "a.jsonl"), write_jsonl(tmp_path / "b.jsonl", ["x"])
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"b.jsonl:1 has no field 'text'"):
        prepare([first, last], tmp_path / "out", PrepareConfig(tokenizer="bpe", workers=1))
    assert not (tmp_path / "out").exists()


def test_damaged_archives_are_named(tmp_path):
    import zstandard

    raw = b'{"text": "x"}\n' * 5000
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(os.urandom(50_000))[:20_000])
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(raw)[:-9])
    (tmp_path / "c.jsonl.gz").write_bytes(b"no gzip at all")
    (tmp_path / "d.parquet").write_bytes(b"no parquet at all")
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.jsonl.gz", "d.parquet"):
        (source,), _ = find_sources([tmp_path / name])
        with pytest.raises(ValueError, match=rf"{name} is damaged or cut off after record \d+"):
            list(source.read())
