"""Settings of the data of a run; without torch, so that help comes at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from mor.data.manifest import is_prepared
from mor.settings import PositiveInt, Settings

BPE = "bpe"
BPE_VOCAB_SIZE = 2048


class DataConfig(Settings, prefix="data"):
    path: str | None = None
    """A .txt, .jsonl (these also .gz or .zst) or .parquet file, a folder of them, or a directory
    made by `mor data prepare`; or a task such as task:state-tracking?hops=16, which has its own
    tokenizer and validation split, or one in words such as words:swaps?hops=6, which has its own
    validation split. None: Python's own documentation, which every installation
    has."""
    validation_path: str | None = None
    """Validation text of the same kinds. None: a share of the text, or the prepared split."""
    text_field: str = "text"
    tokenizer: str | None = None
    """'bytes', 'bpe' (trained on the training documents), a directory or hub name. None: 'bpe', or
    that of prepared data."""
    vocab_size: PositiveInt | None = None
    """Size of the trained BPE. None: 2048."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Of the text; documents are not divided."""
    share_of: Literal["bytes", "documents"] = "bytes"
    """What validation_share counts. Runs of mor 0.1.0 counted documents, and go on with that."""
    document_mask: bool = False
    """Documents of one sequence neither attend to nor compete with each other."""

    def filled(self) -> Self:
        """The same with the defaults of text written out, and those without effect the same: equal
        for equal data, also in the files of mor 0.1.0."""
        tokenizer, vocab_size = self.tokenizer or BPE, self.vocab_size or BPE_VOCAB_SIZE
        found = replace(self, tokenizer=tokenizer, vocab_size=vocab_size)
        path = self.path or ""
        made = path.startswith(("task:", "words:"))
        divided = not (self.validation_path or made or is_prepared(path))
        return found if divided else replace(found, share_of="bytes")

    def located(self) -> Self:
        """The same with absolute paths, so that a run finds its data from any working folder."""
        found: dict[str, Any] = {
            name: str(Path(place).absolute())
            for name in ("path", "validation_path", "tokenizer")
            if (place := getattr(self, name)) not in (None, "bytes", BPE) and Path(place).exists()
        }
        return replace(self, **found)
