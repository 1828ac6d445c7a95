"""The text that a checkpoint is measured on: that of its run, or another."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mor import checkpoint
from mor.data.config import DataConfig
from mor.data.corpus import load_tokens, tokenize
from mor.data.problems import parse_task
from mor.data.sources import Document
from mor.data.stream import TaskData
from mor.data.tokenizer import byte_tokenizer
from mor.training.loop import train
from mor.training.validation import check_validation, validation_of
from tests.training.small_run import metrics, quiet, settings


@pytest.fixture(scope="module")
def trained(squares, tmp_path_factory):
    out = tmp_path_factory.mktemp("validation") / "run"
    data = replace(squares, document_mask=True)
    return train(settings(data, out, steps=1), console=quiet())


def test_a_run_is_measured_as_it_was_validated(trained):
    found = validation_of(trained.path, checkpoint.load(trained.path))
    assert found.seq_len == 32 and found.document_mask
    assert found.name == "the validation data of the run"
    assert len(found.data) == len(trained.corpus.validation)
    assert validation_of(trained.path, checkpoint.load(trained.path), seq_len=8).seq_len == 8


def test_other_text_is_read_whole_in_the_windows_of_the_run(trained, squares, tmp_path):
    loaded = checkpoint.load(trained.path)
    other = tmp_path / "a.txt"
    other.write_text("Seven squared is forty-nine.")
    found = validation_of(trained.path, loaded, other)
    assert found.data.num_documents == 1 and found.seq_len == 32
    assert len(found.data) == len(loaded.tokenizer.encode(other.read_text())) + 1, "and its end"
    assert found.name == str(other)
    with pytest.raises(ValueError, match="is not prepared data, so it has no split 'train'"):
        validation_of(trained.path, loaded, other, split="train")
    with pytest.raises(ValueError, match="needs prepared data"):
        validation_of(trained.path, loaded, split="train")


def jsonl(path, name, numbers):
    rows = [{"text": f"{name} {i} is {i * i}. " * 6} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def replaceable(tmp_path):
    """A run whose texts may be changed."""
    for name in ("train", "held-out"):
        jsonl(tmp_path / f"{name}.jsonl", name, range(20))
    places = [str(tmp_path / f"{name}.jsonl") for name in ("train", "held-out")]
    data = DataConfig(path=places[0], validation_path=places[1], tokenizer="bytes")
    return train(settings(data, tmp_path / "run", steps=1), console=quiet()).path


def test_text_that_was_replaced_is_not_taken_for_that_of_the_run(replaceable, tmp_path):
    loaded = checkpoint.load(replaceable)
    before = len(validation_of(replaceable, loaded).data)
    text = tmp_path / "held-out.jsonl"
    jsonl(text, "Held out", range(21))
    now = len(load_tokens(text, loaded.tokenizer))
    changed = f"validation.tokens was {before:,}, is {now:,}.*--data"
    with pytest.raises(ValueError, match=f"validation.documents was 20, is 21, {changed}"):
        validation_of(replaceable, loaded)
    assert len(validation_of(replaceable, loaded, text).data) == now
    jsonl(text, "dleh-out", range(20))
    with pytest.raises(ValueError, match="another of the same length"):
        validation_of(replaceable, loaded)


def test_the_validation_text_may_lie_elsewhere_and_the_training_text_change(replaceable, tmp_path):
    loaded = checkpoint.load(replaceable)
    before = len(validation_of(replaceable, loaded).data)
    jsonl(tmp_path / "train.jsonl", "other", range(9))
    assert len(validation_of(replaceable, loaded).data) == before


def test_of_an_old_run_it_is_said_that_nothing_is_known(tmp_path, monkeypatch):
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "old_run", tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")  # its settings name text.jsonl
    loaded = checkpoint.load(tmp_path / "run")
    with pytest.warns(UserWarning, match="mor 0.1.0 wrote none.*cannot be checked"):
        assert validation_of(tmp_path / "run", loaded).data.num_documents


def test_a_run_on_a_task_is_not_measured_on_text(tmp_path):
    data = DataConfig(path="task:pointer-chasing")
    path = train(settings(data, tmp_path / "run", steps=1), console=quiet()).path
    loaded = checkpoint.load(path)
    assert validation_of(path, loaded).data.describe() == "512 problems"
    text = tmp_path / "a.txt"
    for written, said in (
        ("The quick brown fox.", "this tokenizer cannot read .*a.txt: .* 100.0% of it, such as"),
        ("a>b b>c +2 a c", "has learned the answers of task:pointer-chasing"),
    ):
        text.write_text(written)
        with pytest.raises(ValueError, match=said):
            validation_of(path, loaded, text)


def test_what_cannot_be_scored_is_known_before_anything_runs():
    short, nothing = (tokenize([Document("a", text)], byte_tokenizer()) for text in ("ab", ""))
    check_validation(short, 64)
    with pytest.raises(ValueError, match="no token to predict"):
        check_validation(nothing, 64)
    with pytest.raises(ValueError, match="seq_len=9 is too short"):
        check_validation(TaskData(parse_task("task:pointer-chasing"), 0, 4), 9)


def test_a_run_that_could_not_be_validated_does_not_begin(tmp_path):
    data = DataConfig(path="task:pointer-chasing")
    with pytest.raises(ValueError, match="seq_len=9 is too short"):
        train(settings(data, tmp_path / "run", steps=1, seq_len=9), console=quiet())
    assert not (tmp_path / "run").exists()


def test_a_run_on_a_task_says_nats_and_no_bytes(tmp_path):
    data = DataConfig(path="task:state-tracking?hops=3")
    console = quiet()
    train(settings(data, tmp_path / "run", steps=1, eval_every=1), console=console)
    assert "nats per token" in console.file.getvalue()
    (row,) = [row for row in metrics(tmp_path / "run") if "validation_nll" in row]
    assert row["validation_bits_per_byte"] is None and row["validation_bytes"] == 0


def test_a_run_on_text_says_what_was_scored(trained):
    (row,) = [row for row in metrics(trained.path.parent.parent) if "validation_nll" in row]
    bits = row["validation_nll"] * row["validation_tokens"] / math.log(2)
    assert row["validation_bits_per_byte"] == pytest.approx(bits / row["validation_bytes"])
