"""manifest.json of prepared data: what is there, and how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mor.data.spelling import Spelling
from mor.files import naming, read_json
from mor.settings import Listed, NonNegativeInt, PositiveInt, Settings

FORMAT = 1
MANIFEST, JOURNAL = "manifest.json", "progress.jsonl"
SPLITS = ("train", "validation")


class ShardEntry(Settings):
    name: Annotated[str, Field(pattern=r"^[\w-]+$")]
    documents: PositiveInt
    tokens: PositiveInt
    bytes: NonNegativeInt
    sha256: str = ""
    """Of tokens and ends; data that mor 0.1.0 prepared has none."""
    spelling: Spelling | None = None
    """How the tokens differ from the text; mor 0.1.0 did not record it."""


class SplitEntry(Settings):
    documents: PositiveInt
    tokens: PositiveInt
    bytes: NonNegativeInt
    shards: Listed[tuple[ShardEntry, ...]]
    spelling: Spelling | None = None

    def __post_init__(self) -> None:
        for name in ("documents", "tokens", "bytes"):
            if sum(getattr(shard, name) for shard in self.shards) != getattr(self, name):
                raise ValueError(f"{name} of the shards do not add up to {getattr(self, name)}")


class TokenizerEntry(Settings):
    asked: str
    fingerprint: str
    vocab_size: PositiveInt
    end_of_text_id: NonNegativeInt


class SettingsEntry(Settings):
    format: PositiveInt
    sources: Listed[tuple[dict[str, Any], ...]]
    text_field: str
    validation_share: Annotated[float, Field(ge=0, lt=1)]
    chunk_megabytes: Annotated[float, Field(gt=0)]
    tokenizer: TokenizerEntry
    dtype: Literal["uint16", "uint32"]


class Manifest(Settings):
    """empty, broken: records that were left out. problems: of the first broken ones. left_out: what
    was left out of folders, in words."""

    format: PositiveInt
    settings: SettingsEntry
    splits: dict[Literal["train", "validation"], SplitEntry]
    empty: NonNegativeInt
    broken: NonNegativeInt
    problems: Listed[tuple[str, ...]]
    left_out: str = ""


def is_prepared(path: str | Path) -> bool:
    """Whether a path is prepared data, finished or not. A folder of text may have a manifest.json
    of its own, but hardly a tokenizer or shards beside it."""
    folder = Path(path)
    begun = (folder / MANIFEST).is_file() or (folder / JOURNAL).is_file()
    return begun and ((folder / "tokenizer.json").is_file() or any(folder.glob("*.ends.npy")))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What :class:`Manifest` describes, as plain values. Raises ValueError for a directory that is
    not prepared, unfinished, damaged or of a later version."""
    if not (folder / MANIFEST).is_file():
        hint = (
            "it is unfinished: run the same `mor data prepare` again"
            if (folder / JOURNAL).is_file()
            else "make it with `mor data prepare`"
        )
        raise ValueError(f"{folder} holds no {MANIFEST}; {hint}")
    values = read_json(folder / MANIFEST)
    if values.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"{folder} has format {values['format']!r}; this version reads {FORMAT}: prepare it "
            "again"
        )
    with naming(f"{folder / MANIFEST} is damaged, prepare the data again"):
        Manifest.from_dict(values)
    return values
