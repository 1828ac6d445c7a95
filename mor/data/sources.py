"""Where documents come from: files, folders of files, data sets of the Hugging Face hub.

A source is a stream of records: see :mod:`mor.data.readers`.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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


LeftOut = dict[str, list[str]]
"""Paths in folders that are not read, by what they are."""


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
                name = f"{self.name}:{number}"
                yield record_from(name, row, self.text_field, first=number == 1), 0
        except MissingFieldError:
            raise
        except Exception as error:  # no network, an unknown name, a column that cannot be cast
            raise ValueError(
                f"{self.name} cannot be read (after record {number}): {error}"
            ) from error


def find_sources(
    places: Sequence[str | Path],
    *,
    text_field: str = "text",
    subset: str | None = None,
    split: str = "train",
) -> tuple[list[Source], LeftOut]:
    """The sources at ``places``, in reading order, and what is left out of folders.

    places: files, folders or hub:OWNER/NAME. Folders are walked in sorted order, linked ones too,
    each once. subset, split: of hub data sets. Raises ValueError for what cannot be read.
    """
    found: list[Source] = []
    left_out: LeftOut = {}
    for place in map(str, places):
        path = Path(place)
        if place.startswith("hub:"):
            found.append(HubSource(place.removeprefix("hub:"), subset, split, text_field))
        elif path.is_dir():
            found += _in_folder(path, text_field, left_out)
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


def _in_folder(folder: Path, text_field: str, left_out: LeftOut) -> list[FileSource]:
    """The files that can be read; the others are added to ``left_out``."""
    known: dict[str, Path] = {}
    others: LeftOut = {}
    found = sorted(_walk(folder, others))
    for path in sorted(found, key=Path.is_symlink):  # a file is known by its own name, not a link's
        real = os.path.realpath(path)
        if why := _unreadable(path) or ("read under another name" if real in known else ""):
            others.setdefault(why, []).append(_shown(path))
        else:
            known[real] = path
    if not known:
        held = f"it holds only {in_words(others)}" if others else "it is empty"
        raise ValueError(f"nothing to read in the folder {folder}: {held}; give {_READABLE}")
    for why, paths in others.items():
        left_out.setdefault(why, []).extend(paths)
    return [
        FileSource(path, _shown(path.relative_to(folder)), text_field)
        for path in sorted(known.values())
    ]


def _walk(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """Everything below a folder that is no folder and not hidden. Links to folders are followed
    when the rest is done; a folder comes once, however many links lead to it."""

    def leave_out(why: str, *paths: str | Path) -> None:
        if paths:
            left_out.setdefault(why, []).extend(map(_shown, sorted(paths)))

    visited: set[str] = set()
    waiting = [str(folder)]
    while waiting:
        walk = os.walk(waiting.pop(0), onerror=lambda e: leave_out("not to be read", e.filename))
        for place, folders, files in walk:
            if (real := os.path.realpath(place)) in visited:
                leave_out("read under another name", place)
                folders.clear()
                continue
            visited.add(real)
            hidden = [name for name in (*folders, *files) if name.startswith(".")]
            leave_out("hidden", *(Path(place, name) for name in hidden))
            folders[:] = sorted(set(folders).difference(hidden))
            waiting += [p for name in folders if os.path.islink(p := os.path.join(place, name))]
            yield from (Path(place, name) for name in files if name not in hidden)


def _unreadable(path: Path) -> str:
    """Why a file in a folder is left out; empty if it is read."""
    if not path.exists():
        return "broken links"
    if not path.is_file():
        return "no regular files"
    if not kind_of(path):
        return "of other kinds"
    if not os.access(path, os.R_OK):
        return "not to be read"
    return "" if path.stat().st_size else "empty"


def _shown(path: str | Path) -> str:
    """A path that can be printed; its name need not be valid UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def in_words(left_out: Mapping[str, Sequence[str]]) -> str:
    """How much was left out, with an example of each kind; empty if nothing was."""
    return ", ".join(f"{len(paths)} {why} ({paths[0]})" for why, paths in left_out.items())


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


def read_documents(path: str | Path, text_field: str = "text") -> list[Document]:
    """All documents of a file, folder or hub data set, in memory.

    Empty and broken records and files in folders that are no text are left out with warnings that
    count them. Raises ValueError for what cannot be read or holds no text.
    """
    sources, left_out = find_sources([path], text_field=text_field)
    documents, problems, empty = [], [], []
    for source in sources:
        for record, _ in source.read():
            if record.problem:
                problems.append(f"{record.name} {record.problem}")
            elif record.text.strip():
                documents.append(Document(record.name, record.text))
            else:
                empty.append(record.name)
    lost = [f"{len(problems)} broken record(s), the first: {problems[0]}"] if problems else []
    lost += [f"{len(empty)} empty document(s), the first: {empty[0]}"] if empty else []
    lost += [f"in folders: {in_words(left_out)}"] if left_out else []
    if not documents:
        raise ValueError("; ".join([f"{path} holds no text", *lost]))
    for what in lost:
        warnings.warn(f"{path}: left out {what}", stacklevel=2)
    return documents
