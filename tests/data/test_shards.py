"""Prepared data: the same bytes whatever happens on the way, and nothing dropped in silence."""

import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from filelock import FileLock

from mor.data.config import DataConfig
from mor.data.corpus import load_corpus, load_tokens, open_shards
from mor.data.shards import PrepareConfig, prepare, read_manifest
from mor.data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from mor.files import LOCK
from tests.conftest import tiny
from tests.data.documents import TEXTS, write_jsonl

SMALL = PrepareConfig(tokenizer="bytes", chunk_megabytes=0.002, workers=1, validation_share=0.2)


def content(folder):
    return {
        p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".npy")
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    source = write_jsonl(folder / "a.jsonl")
    return source, folder / "out", prepare([source], folder / "out", SMALL)


def test_shards_hold_every_document_with_its_end(prepared):
    _, out, manifest = prepared
    tokenizer = Tokenizer.load(out)
    seen = []
    for split in ("train", "validation"):
        data = open_shards(out, split, tokenizer)
        first = data.parts[0].open()
        assert len(data.parts) > 3 and first.tokens.dtype == np.uint16
        assert isinstance(first.tokens, np.memmap) and isinstance(first.ends, np.memmap)
        counts = manifest["splits"][split]
        assert (len(data), data.num_documents, data.num_bytes) == (
            counts["tokens"],
            counts["documents"],
            counts["bytes"],
        )
        for part in (shard.open() for shard in data.parts):
            for start, end in zip([0, *part.ends[:-1]], part.ends, strict=True):
                assert part.tokens[end - 1] == tokenizer.end_of_text_id
                seen.append(tokenizer.decode(part.tokens[start : end - 1].tolist()))
    assert sorted(seen) == sorted(TEXTS)
    assert 10 < manifest["splits"]["validation"]["documents"] < 60
    assert not [p for p in out.iterdir() if p.name.endswith(".tmp") or p.name == "progress.jsonl"]


def test_the_number_of_workers_does_not_matter(prepared, tmp_path, real_workers):
    source, out, _ = prepared
    from dataclasses import replace

    prepare([source], tmp_path / "out", replace(SMALL, workers=3))
    assert content(tmp_path / "out") == content(out)


def test_a_finished_directory_is_left_alone_and_other_settings_are_refused(prepared, tmp_path):
    from dataclasses import replace

    source, out, manifest = prepared
    assert prepare([source], out, SMALL) == manifest
    with pytest.raises(ValueError, match=r"validation_share was 0.2, now it is 0.5"):
        prepare([source], out, replace(SMALL, validation_share=0.5))
    with pytest.raises(ValueError, match="tokens of two tokenizers do not mix"):
        prepare([source], out, replace(SMALL, tokenizer="bpe", vocab_size=300))
    other = write_jsonl(tmp_path / "b.jsonl", TEXTS[:3])
    with pytest.raises(ValueError, match=r"sources changed since: a.jsonl, b.jsonl"):
        prepare([other], out, SMALL)
    with pytest.raises(ValueError, match=r"holds other things, such as b.jsonl"):
        prepare([other], tmp_path, SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.jsonl"], "nothing was left there"
    with pytest.raises(ValueError, match="no source was given"):
        prepare([], tmp_path / "x", SMALL)


def test_the_working_folder_does_not_matter(prepared, monkeypatch):
    _, out, manifest = prepared
    monkeypatch.chdir(out.parent)
    assert prepare(["a.jsonl"], "out", SMALL) == manifest


@pytest.mark.parametrize("journal", ["", "{", "null\n", "{}\n", "[1]\n"])
def test_a_damaged_journal_is_named(journal, prepared, tmp_path):
    (tmp_path / "progress.jsonl").write_text(journal)
    with pytest.raises(ValueError, match=r"progress.jsonl is damaged, delete .* to begin anew"):
        prepare([prepared[0]], tmp_path, SMALL)


SLOWED = """
import sys, time
import mor.data.shards as shards
real = shards._row
def slow(*arguments):
    time.sleep(0.02)
    return real(*arguments)
shards._row = slow
if __name__ == "__main__":
    config = shards.PrepareConfig(
        tokenizer="bytes", chunk_megabytes=0.002, workers=2, validation_share=0.2
    )
    shards.prepare([sys.argv[1]], sys.argv[2], config)
"""


def test_kills_at_any_moment_change_nothing(prepared, tmp_path):
    source, out, manifest = prepared
    script = tmp_path / "run.py"
    script.write_text(SLOWED)
    again = tmp_path / "again"
    kills = 0
    for chunks in (2, 9, 100):
        process = subprocess.Popen([sys.executable, script, source, again], stderr=subprocess.PIPE)
        while process.poll() is None:
            with suppress(FileNotFoundError):  # before its first line, and once all is finished
                if (again / "progress.jsonl").read_text().count("\n") > chunks:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
            time.sleep(0.002)
        process.communicate()
        (again / ".train-00099.bin.1.tmp").write_bytes(b"half")
        if not (again / "manifest.json").is_file():
            with (again / "progress.jsonl").open("a") as journal_file:
                journal_file.write('{"chunk": 7, "spl')  # a line cut off
    assert kills >= 2
    found = prepare([source], again, SMALL)
    assert content(again) == content(out) and not list(again.glob(".*.tmp"))
    assert found["splits"] == manifest["splits"] and found["empty"] == manifest["empty"]


def test_two_processes_do_not_prepare_the_same_directory(prepared):
    source, out, manifest = prepared
    with (
        FileLock(out / LOCK),
        pytest.raises(ValueError, match="another process is preparing"),
    ):
        prepare([source], out, SMALL)
    assert prepare([source], out, SMALL) == manifest


def test_finished_files_are_not_read_again(tmp_path, monkeypatch):
    import mor.data.shards as shards

    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        write_jsonl(folder / f"{i}.jsonl", TEXTS[i * 30 : i * 30 + 30])
    real, rows = shards._row, []

    def stop(*arguments):
        if len(rows) == 6:
            raise KeyboardInterrupt
        rows.append(real(*arguments))
        return rows[-1]

    monkeypatch.setattr(shards, "_row", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare([str(folder)], tmp_path / "out", SMALL)
    monkeypatch.setattr(shards, "_row", real)
    read = []
    from mor.data.sources import FileSource

    original = FileSource.read
    monkeypatch.setattr(
        FileSource,
        "read",
        lambda self, skip=0: read.append((self.name, skip)) or original(self, skip),
    )
    prepare([str(folder)], tmp_path / "out", SMALL)
    done = {row["chunk"]: tuple(row["next_place"]) for row in rows}
    place = done[next(i for i in range(7) if i + 1 not in done)]  # they end in any order
    assert read[0] == (f"{place[0]}.jsonl", place[1]) and place > (0, 0)
    monkeypatch.undo()
    prepare([str(folder)], tmp_path / "whole", SMALL)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_broken_and_empty_records_are_counted_and_named(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b'{"text": ""}',
        b'{"text": "  "}',
        b"",
        b'{"text": 7}',
        b'{"text": null}',
        b"\xff\xfe",
        b"[1]",
        b'{"text": "\\ud800"}',
        b'{"text": "also good"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = prepare(
        [str(tmp_path / "a.jsonl")], tmp_path / "out", PrepareConfig(tokenizer="bytes", workers=1)
    )
    assert (
        found["splits"]["train"]["documents"] == 2 and found["empty"] == 3 and found["broken"] == 6
    )
    named = " | ".join(found["problems"])
    for place, why in [
        (2, "not valid JSON"),
        (6, "int in field"),
        (7, "null in field"),
        (8, "not valid UTF-8"),
        (9, "not an object"),
    ]:
        assert f"a.jsonl:{place} " in named and why in named
    assert "a.jsonl:10 is not valid Unicode" in named


def test_a_full_disk_leaves_no_half_shard(prepared, tmp_path):
    source, out, _ = prepared
    limited = (
        "import resource, sys; from mor.data.shards import *\n"
        "if __name__ == '__main__':\n"
        "    import mor.data.shards as s, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    real = s._tokenize\n"
        "    def few(*a):\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); return real(*a)\n"
        "    s._tokenize = few\n"
        f"    prepare([{source!r}], {str(tmp_path / 'out')!r}, PrepareConfig(tokenizer='bytes', "
        "chunk_megabytes=0.002, workers=1, validation_share=0.2))\n"
    )
    (tmp_path / "run.py").write_text(limited)
    done = subprocess.run([sys.executable, tmp_path / "run.py"], capture_output=True, text=True)
    assert done.returncode != 0 and "make room and run the same command again" in done.stderr, (
        done.stderr[-2000:]
    )
    assert not list((tmp_path / "out").glob(".*.tmp"))
    prepare([source], tmp_path / "out", SMALL)
    assert content(tmp_path / "out") == content(out)


def test_large_vocabularies_take_four_bytes(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    vocab = {f"w{i}": i for i in range(70_000)} | {"<|endoftext|>": 70_000}
    backend = Backend(models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "tok").mkdir()
    Tokenizer(backend).save(tmp_path / "tok")
    source = write_jsonl(tmp_path / "a.jsonl", ["w69999 w5"])
    found = prepare(
        [source], tmp_path / "out", PrepareConfig(tokenizer=str(tmp_path / "tok"), workers=1)
    )
    assert found["settings"]["dtype"] == "uint32"
    data = open_shards(tmp_path / "out", "train", Tokenizer.load(tmp_path / "out"))
    assert data.tokens(0, 3).tolist() == [69_999, 5, 70_000]


def test_a_trained_tokenizer_is_kept_and_can_be_used_again(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    first = PrepareConfig(tokenizer="bpe", vocab_size=300, workers=1)
    prepare([source], tmp_path / "one", first)
    prepare([source], tmp_path / "two", PrepareConfig(tokenizer=str(tmp_path / "one"), workers=1))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert Tokenizer.load(tmp_path / "one").fingerprint == train_bpe(TEXTS, 300).fingerprint
    assert (
        train_bpe(TEXTS, 300).fingerprint
        != train_bpe(TEXTS, 301).fingerprint
        != byte_tokenizer().fingerprint
    )


def test_masked_training_on_shards_equals_each_document_alone(prepared):
    """From text to loss: the batch's documents, each run alone as end-of-text plus text, give the
    same loss."""
    _, out, _ = prepared
    tokenizer = Tokenizer.load(out)
    data = open_shards(out, "train", tokenizer)
    model = tiny("expert_choice", vocab_size=tokenizer.vocab_size, max_seq_len=256).double()
    batch = data.batch([0, 5], 200, documents=True)
    together = model(
        batch.tokens_BT,
        targets_BT=batch.targets_BT,
        documents_BT=batch.documents_BT,
        selection="topk",
    )
    total = count = 0
    for row in range(2):
        changes = (batch.documents_BT[row].diff() != 0).nonzero()[:, 0] + 1
        for place in torch.arange(200).tensor_split(changes):
            tokens, targets = batch.tokens_BT[row, place], batch.targets_BT[row, place]
            if place[0] > 0:
                assert tokens[0] == tokenizer.end_of_text_id, (
                    "a document begins with the end of the one before"
                )
            assert tokenizer.end_of_text_id not in tokens[1:]
            total += model(tokens[None], targets_BT=targets[None], selection="topk").nll * len(
                place
            )
            count += len(place)
        assert len(changes) >= 1
    torch.testing.assert_close(together.nll, total / count)


def test_training_reads_prepared_data_and_names_what_does_not_fit(prepared, tmp_path):
    first, out, _ = prepared
    corpus = load_corpus(DataConfig(path=str(out)))
    assert corpus.train.num_documents + corpus.validation.num_documents == 150
    assert (
        corpus.tokenizer.fingerprint == read_manifest(out)["settings"]["tokenizer"]["fingerprint"]
    )
    with pytest.raises(
        ValueError, match=r"was prepared with the tokenizer 'bytes' \(\w+\), not with .*\(\w+\)"
    ):
        load_corpus(DataConfig(path=str(out)), train_bpe(TEXTS, 300))
    source = write_jsonl(tmp_path / "a.jsonl", [text.upper() for text in TEXTS])
    prepare([source], tmp_path / "all", PrepareConfig(tokenizer="bytes", workers=1))
    with pytest.raises(ValueError, match=r"has no validation split; set data.validation_path"):
        load_corpus(DataConfig(path=str(tmp_path / "all")))
    both = load_corpus(DataConfig(path=str(tmp_path / "all"), validation_path=str(out)))
    assert both.train.num_documents == 150 and len(both.validation) == len(corpus.validation)
    texts = load_corpus(DataConfig(path=source, validation_path=first, tokenizer="bytes"))
    assert len(texts.train) == len(texts.validation) == len(both.train)
    assert len(load_tokens(tmp_path / "all", byte_tokenizer())) == len(both.train)
    shard = next((tmp_path / "all").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"is missing or not .* bytes long"):
        load_corpus(DataConfig(path=str(tmp_path / "all"), validation_path=str(out)))
