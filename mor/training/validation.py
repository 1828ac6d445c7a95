"""The text that a run or checkpoint is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mor.checkpoint import Checkpoint
from mor.data.config import DataConfig
from mor.data.manifest import is_prepared
from mor.data.stream import Windows, held_out_split, load_corpus, load_tokens
from mor.training.config import settings_of


class Validation(NamedTuple):
    """seq_len: tokens in a window. document_mask: whether documents are masked from each other.
    name: what the data are, in words."""

    data: Windows
    seq_len: int
    document_mask: bool
    name: str


def validation_of(
    path: Path,
    loaded: Checkpoint,
    data: Path | None = None,
    *,
    text_field: str = "text",
    split: str | None = None,
    seq_len: int | None = None,
) -> Validation:
    """``data``, or else the validation text of the run that ``path`` means, in windows as in
    training.

    loaded: the checkpoint at ``path``. split: of prepared data; None is the validation split, or
    the only one. seq_len: None is that of the run, or of the model for a checkpoint outside a run.
    """
    run = settings_of(path)
    if data is None and split:
        raise ValueError(f"split={split!r} needs prepared data; give it as --data")
    found = (
        load_tokens(data, loaded.tokenizer, text_field, split)
        if data
        else load_corpus(run.data if run else DataConfig(), loaded.tokenizer).validation
    )
    return Validation(
        found,
        seq_len or (run.seq_len if run else loaded.config.max_seq_len),
        run.data.document_mask if run else False,
        _name(data, split, has_run=run is not None),
    )


def _name(data: Path | None, split: str | None, *, has_run: bool) -> str:
    if data is None:
        return "the validation data of " + ("the run" if has_run else "Python's documentation")
    if not is_prepared(data):
        return str(data)
    return f"the {split or held_out_split(data)} split of {data}"


def check_validation(data: Windows, seq_len: int) -> None:
    """Raise ValueError for data that cannot be scored in windows of ``seq_len`` tokens. It reads
    one window, so that a run knows it before its first step."""
    next(data.scored(seq_len, 1))
