"""Where documents are found, and what is left out."""

import json
import os
from pathlib import Path

import pytest

from mor.data.shards import PrepareConfig, prepare
from mor.data.sources import find_sources, in_words, read_documents
from tests.data.documents import TEXTS, write_jsonl


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


def test_folders_are_walked_in_order_and_tell_what_they_leave_out(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    write_jsonl(tmp_path / "in" / "b" / "1.jsonl", TEXTS[:2])
    write_jsonl(tmp_path / "in" / "a.jsonl", TEXTS[2:4])
    (tmp_path / "in" / "readme.md").write_text("x")
    (tmp_path / "in" / ".hidden.jsonl").write_text("x")
    sources, left_out = find_sources([tmp_path / "in"])
    assert [s.name for s in sources] == ["a.jsonl", "b/1.jsonl"]
    assert left_out == {
        "hidden": [str(tmp_path / "in" / ".hidden.jsonl")],
        "of other kinds": [str(tmp_path / "in" / "readme.md")],
    }
    with pytest.raises(ValueError, match=r"it holds only 1 of other kinds \(.*x.md\)"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "x.md").write_text("x")
        find_sources([tmp_path / "other"])
    write_jsonl(tmp_path / "in" / "b" / "a.jsonl", TEXTS[4:5])
    twins, _ = find_sources([tmp_path / "in" / "a.jsonl", tmp_path / "in" / "b" / "a.jsonl"])
    assert twins[0].name != twins[1].name, "documents are told apart by their source's name"
    with pytest.raises(ValueError, match="given twice"):
        find_sources([tmp_path / "in", tmp_path / "in" / "a.jsonl"])
    with pytest.raises(ValueError, match="is not a file or folder"):
        find_sources([tmp_path / "nowhere"])


def test_links_are_followed_once_and_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "sub", outside / "deep"):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(f"text of {folder.name}")
    links = {
        inside / "linked": outside,
        inside / "loop": inside,
        outside / "deep" / "up": inside,
        inside / "z.txt": inside / "sub" / "a.txt",
        inside / "nowhere.txt": tmp_path / "missing",
        inside / "circle.txt": inside / "circle.txt",
    }
    for link, target in links.items():
        link.symlink_to(target)
    os.mkfifo(inside / "pipe.txt")
    (inside / "nothing.txt").touch()
    (inside / "closed.txt").write_text("x")
    may = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: p.name != "closed.txt" and may(p, mode))
    with pytest.warns(UserWarning) as told:
        documents = read_documents(inside)
    assert [d.name for d in documents] == ["linked/deep/a.txt:0", "sub/a.txt:0"]
    assert [d.text for d in documents] == ["text of deep", "text of sub"]
    _, left_out = find_sources([inside])
    assert {why: sorted(Path(p).name for p in paths) for why, paths in left_out.items()} == {
        "broken links": ["circle.txt", "nowhere.txt"],
        "read under another name": ["loop", "up", "z.txt"],
        "no regular files": ["pipe.txt"],
        "empty": ["nothing.txt"],
        "not to be read": ["closed.txt"],
    }
    assert [str(w.message) for w in told] == [
        f"{inside}: left out in folders: {in_words(left_out)}"
    ]


def test_empty_documents_are_counted_when_text_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": " "}\n\n{"text": "y"}\n')
    with pytest.warns(UserWarning, match=r"2 empty document\(s\), the first: a.jsonl:2"):
        assert len(read_documents(tmp_path / "a.jsonl")) == 2


def test_a_hub_data_set_streams(tmp_path, monkeypatch):
    import pyarrow as arrow
    from pyarrow import parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set" / "fineweb-edu-dedup"
    folder.mkdir(parents=True)
    table = arrow.table({"text": TEXTS, "id": [str(i) for i in range(len(TEXTS))]})
    parquet.write_table(table, folder / "train-00000.parquet")
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: fineweb-edu-dedup\n  data_files: "
        "fineweb-edu-dedup/*.parquet\n---\n"
    )
    place = f"hub:{tmp_path / 'set'}"
    (source,), _ = find_sources([place], subset="fineweb-edu-dedup")
    assert [record.text for record, _ in source.read(140)] == TEXTS[140:]
    hub = PrepareConfig(
        tokenizer="bytes", workers=1, subset="fineweb-edu-dedup", chunk_megabytes=0.01
    )
    found = prepare([place], tmp_path / "out", hub)
    assert found["splits"]["train"]["documents"] == 150
    with pytest.raises(ValueError, match="cannot be read"):
        list(find_sources([place], subset="nothing-like-this")[0][0].read())
    with pytest.raises(ValueError, match="is for hub data sets"):
        find_sources([tmp_path], subset="x")
