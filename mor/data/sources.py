"""Where documents come from: files, folders of files, data sets of the Hugging Face hub.

A source is a stream of records: see :mod:`mor.data.readers`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mor.data.readers import (
    MissingFieldError,
    Record,
    kind_of,
    optional_module,
    read_file,
    record_from,
)
from mor.hub_access import asking_the_hub

_READABLE = (
    "a .txt, .jsonl (both also .gz or .zst) or .parquet file, a folder of these, or hub:OWNER/NAME"
)


class Document(NamedTuple):
    name: str
    text: str


class Source(Protocol):
    """name: unique in a list of sources. num_bytes: size on disk; None if unknown."""

    @property
    def name(self) -> str: ...

    @property
    def num_bytes(self) -> int | None: ...

    def describe(self) -> dict[str, Any]:
        """What identifies this source in its present state, as plain values."""
        ...

    def read(self, skip: int = 0) -> Iterator[tuple[Record, int]]:
        """Records after the first ``skip``, each with the source's bytes read so far.

        Raises ValueError if a record has no text field or the source is damaged, saying where.
        """
        ...


@dataclass(frozen=True)
class FileSource:
    path: Path
    name: str
    text_field: str = "text"

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size

    def describe(self) -> dict[str, Any]:
        status = self.path.stat()
        return {
            "name": self.name,
            "path": str(self.path),
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
        }

    def read(self, skip: int = 0) -> Iterator[tuple[Record, int]]:
        return read_file(self.path, name=self.name, text_field=self.text_field, skip=skip)


@dataclass(frozen=True)
class HubSource:
    """A data set streamed by ``datasets``: OWNER/NAME on the hub, or a local folder it can read."""

    dataset: str
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"

    @property
    def name(self) -> str:
        return ":".join(["hub", self.dataset, *([self.subset] if self.subset else []), self.split])

    @property
    def num_bytes(self) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dataset": self.dataset,
            "subset": self.subset,
            "split": self.split,
        }

    def read(self, skip: int = 0) -> Iterator[tuple[Record, int]]:
        datasets = optional_module("datasets")
        datasets.disable_progress_bars()
        number = skip
        try:
            with asking_the_hub(self.dataset):
                rows = datasets.load_dataset(
                    self.dataset, self.subset, split=self.split, streaming=True
                )
            for number, row in enumerate(rows.skip(skip) if skip else rows, start=skip + 1):
                yield record_from(f"{self.name}:{number}", row, self.text_field), 0
        except MissingFieldError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # no network, or an unknown name
            raise ValueError(
                f"{self.name} cannot be read (after record {number}): {error}"
            ) from error


def find_sources(
    places: Sequence[str | Path],
    *,
    text_field: str = "text",
    subset: str | None = None,
    split: str = "train",
) -> tuple[list[Source], list[str]]:
    """The sources at ``places``, in reading order, and the files in folders that were left out for
    their suffix.

    places: files, folders or hub:OWNER/NAME. Folders are walked in sorted order, without hidden
    files. subset, split: of hub data sets. Raises ValueError for what cannot be read.
    """
    found: list[Source] = []
    left_out: list[str] = []
    for place in map(str, places):
        path = Path(place)
        if place.startswith("hub:"):
            found.append(HubSource(place.removeprefix("hub:"), subset, split, text_field))
        elif path.is_dir():
            sources, others = _in_folder(path, text_field)
            found += sources
            left_out += others
        elif not path.is_file():
            raise ValueError(f"{path} is not a file or folder; give {_READABLE}")
        elif not kind_of(path):
            raise ValueError(f"{path} ends in {path.suffix!r}; give {_READABLE}")
        else:
            found.append(FileSource(path, path.name, text_field))
    if subset and not any(isinstance(s, HubSource) for s in found):
        raise ValueError(
            f"subset={subset!r} is for hub data sets; write hub:OWNER/NAME or leave it out"
        )
    return _with_own_names(found), left_out


def _in_folder(folder: Path, text_field: str) -> tuple[list[FileSource], list[str]]:
    """Its files that can be read, and the others."""
    inside = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _hidden(path.relative_to(folder))
    ]
    known = [path for path in inside if kind_of(path)]
    if not known:
        suffixes = sorted({"".join(path.suffixes[-2:]) or path.name for path in inside})
        held = f"it holds only {', '.join(suffixes)}" if suffixes else "it is empty"
        raise ValueError(f"nothing to read in the folder {folder}: {held}; give {_READABLE}")
    sources = [FileSource(p, p.relative_to(folder).as_posix(), text_field) for p in known]
    return sources, [str(path) for path in inside if not kind_of(path)]


def _with_own_names(sources: list[Source]) -> list[Source]:
    """Name files of equal names by their paths. Raises ValueError for a source given twice."""
    places = [str(s.path.resolve()) if isinstance(s, FileSource) else s.name for s in sources]
    place, times = Counter(places).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{place} is given twice; leave one out")
    frequency = Counter(s.name for s in sources)
    return [
        replace(s, name=str(s.path)) if isinstance(s, FileSource) and frequency[s.name] > 1 else s
        for s in sources
    ]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_documents(path: str | Path, text_field: str = "text") -> list[Document]:
    """All documents of a file, folder or hub data set, in memory.

    Broken records and files of other kinds are left out with a warning that counts them. Raises
    ValueError for what cannot be read or holds no text.
    """
    sources, left_out = find_sources([path], text_field=text_field)
    documents, problems = [], []
    for source in sources:
        for record, _ in source.read():
            if record.problem:
                problems.append(f"{record.name} {record.problem}")
            elif record.text.strip():
                documents.append(Document(record.name, record.text))
    broken = f"{len(problems)} broken record(s), the first: {problems[0]}" if problems else ""
    if not documents:
        raise ValueError(f"{path} holds no text" + (f"; {broken}" if broken else ""))
    if broken:
        warnings.warn(f"{path}: left out {broken}", stacklevel=2)
    if left_out:
        warnings.warn(
            f"{path}: left out {len(left_out)} file(s) of other kinds, such as {left_out[0]}",
            stacklevel=2,
        )
    return documents


def draw(name: str) -> float:
    """A number in [0, 1) that depends only on a document's name. Documents below the validation
    share are held out."""
    return (
        int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64
    )
