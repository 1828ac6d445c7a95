"""The text that a checkpoint is measured on: that of its run, or another."""

from dataclasses import replace

import pytest

from mor import checkpoint
from mor.training.loop import train
from mor.training.validation import validation_of
from tests.training.small_run import quiet, settings


@pytest.fixture(scope="module")
def trained(squares, tmp_path_factory):
    out = tmp_path_factory.mktemp("validation") / "run"
    data = replace(squares, document_mask=True)
    return train(settings(data, out, steps=1), console=quiet())


def test_a_run_is_measured_as_it_was_validated(trained):
    found = validation_of(trained.path, checkpoint.load(trained.path))
    assert found.seq_len == 32 and found.document_mask
    assert len(found.data) == len(trained.corpus.validation)
    assert validation_of(trained.path, checkpoint.load(trained.path), seq_len=8).seq_len == 8


def test_other_text_is_read_whole_in_the_windows_of_the_run(trained, squares, tmp_path):
    loaded = checkpoint.load(trained.path)
    other = tmp_path / "a.txt"
    other.write_text("Seven squared is forty-nine.")
    found = validation_of(trained.path, loaded, other)
    assert found.data.num_documents == 1 and found.seq_len == 32
    assert len(found.data) == len(loaded.tokenizer.encode(other.read_text())) + 1, "and its end"
