"""The text that a run or checkpoint is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mor.checkpoint import Checkpoint
from mor.data.config import DataConfig
from mor.data.stream import Windows, load_corpus, load_tokens
from mor.training.config import settings_of


class Validation(NamedTuple):
    """seq_len: tokens in a window. document_mask: whether documents are masked from each other."""

    data: Windows
    seq_len: int
    document_mask: bool


def validation_of(
    path: Path,
    loaded: Checkpoint,
    data: Path | None = None,
    *,
    text_field: str = "text",
    seq_len: int | None = None,
) -> Validation:
    """``data``, or else the validation text of the run that ``path`` means, in windows as in
    training.

    loaded: the checkpoint at ``path``. seq_len: None is that of the run, or of the model for a
    checkpoint outside a run.
    """
    run = settings_of(path)
    found = (
        load_tokens(data, loaded.tokenizer, text_field)
        if data
        else load_corpus(run.data if run else DataConfig(), loaded.tokenizer).validation
    )
    return Validation(
        found,
        seq_len or (run.seq_len if run else loaded.config.max_seq_len),
        run.data.document_mask if run else False,
    )
