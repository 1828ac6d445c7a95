"""Settings of the data of a run; without torch, so that help comes at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field

from mor.settings import PositiveInt, Settings


class DataConfig(Settings, prefix="data"):
    path: str | None = None
    """A .txt, .jsonl (these also .gz or .zst) or .parquet file, a folder of them, or a directory
    made by `mor data prepare`; or a task such as task:state-tracking?hops=16, which has its own
    tokenizer and validation split. None: Python's own documentation, which every installation
    has."""
    validation_path: str | None = None
    """Validation text of the same kinds. None: a share of the documents, or the prepared split."""
    text_field: str = "text"
    tokenizer: str = "bpe"
    """'bytes', 'bpe' (trained on the training documents), a directory or hub name; prepared data
    has its own."""
    vocab_size: PositiveInt = 2048
    """Size of the trained BPE."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    document_mask: bool = False
    """Documents of one sequence neither attend to nor compete with each other."""

    def located(self) -> Self:
        """The same with absolute paths, so that a run finds its data from any working folder."""
        found: dict[str, Any] = {
            name: str(Path(place).absolute())
            for name in ("path", "validation_path", "tokenizer")
            if (place := getattr(self, name)) not in (None, "bytes", "bpe") and Path(place).exists()
        }
        return replace(self, **found)
