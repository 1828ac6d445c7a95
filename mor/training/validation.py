"""The text that a run or checkpoint is measured on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from mor import checkpoint
from mor.checkpoint import Checkpoint
from mor.data.config import DataConfig
from mor.data.corpus import held_out_split, load_corpus, load_tokens, what_changed
from mor.data.manifest import is_prepared
from mor.data.problems import PREFIX
from mor.data.stream import Windows
from mor.training.config import settings_of

_VALIDATION = "validation."  # how a corpus's fingerprint begins the names of this split


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

    Raises ValueError if the run's data are no longer those that it was validated on, and for text
    given to a run that has learned a task.
    """
    run = settings_of(path)
    found: Windows
    if data is None:
        if split:
            raise ValueError(f"split={split!r} needs prepared data; give it as --data")
        found = load_corpus(run.data if run else DataConfig(), loaded.tokenizer).validation
        if run is not None:
            _refuse_other_text(path, found)
    else:
        found = load_tokens(data, loaded.tokenizer, text_field, split)
        if run is not None and (task := run.data.path or "").startswith(PREFIX):
            raise ValueError(
                f"{path} has learned the answers of {task}, not the next tokens of a text; leave "
                "out --data"
            )
    return Validation(
        found,
        seq_len or (run.seq_len if run else loaded.config.max_seq_len),
        run.data.document_mask if run else False,
        _name(data, split, has_run=run is not None),
    )


def _refuse_other_text(path: Path, found: Windows) -> None:
    """Raise ValueError if these are not the validation data that the checkpoint's run had."""
    folder = checkpoint.resolve(path)
    has_state = (folder / "training_state").is_dir()
    saved = checkpoint.load_progress(folder).get("data") if has_state else None
    if saved is None:
        text = (
            f"{folder} keeps no fingerprint of its data (mor 0.1.0 wrote none): whether the "
            "validation data are still the same cannot be checked"
        )
        warnings.warn(text, stacklevel=3)
        return
    before = {name: value for name, value in saved.items() if name.startswith(_VALIDATION)}
    now = {_VALIDATION + name: value for name, value in found.fingerprint().items()}
    if changed := what_changed(before, now):
        raise ValueError(
            f"the validation data are no longer those of {folder}: {changed}. Restore what was "
            "there, or say what to read instead with --data"
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
