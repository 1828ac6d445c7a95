"""Where documents come from: text, JSON lines and parquet files, folders of these, hub data sets,
Python itself.

Every reader is a stream: a record is in memory only while someone holds it. Records that cannot be
used (broken, empty) come out of the stream as well, so that callers can count and report them.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib
import itertools
import json
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, Protocol

from mor.files import cache_folder, extra, replacing

KINDS = (".txt", ".jsonl", ".parquet")
PACKINGS = (".gz", ".zst")
_READABLE = (
    "a .txt, .jsonl (both also .gz or .zst) or .parquet file, a folder of these, or hub:OWNER/NAME"
)
_BLOCK_BYTES = 1 << 18
_PIECE_CHARACTERS = 4_000
_LONGEST_PIECE_CHARACTERS = 100_000


class Document(NamedTuple):
    name: str
    text: str


class Record(NamedTuple):
    """What stands at one place of a source. text: blank if empty. problem: why it is broken; then
    text is blank."""

    name: str
    text: str
    problem: str = ""


class Source(Protocol):
    """name: unique in a list of sources. num_bytes: size on disk; None if unknown."""

    @property
    def name(self) -> str: ...

    @property
    def num_bytes(self) -> int | None: ...

    def describe(self) -> dict[str, Any]:
        """What tells this source, in this state, from others; plain values."""
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
        kind = _kind(self.path)
        reader = _READERS[kind.removesuffix(Path(kind).suffix) if kind.endswith(PACKINGS) else kind]
        done = skip
        try:
            for done, found in enumerate(reader(self, skip), start=skip + 1):  # noqa: B007
                yield found
        except Exception as error:
            if not isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error, *damage_errors())):
                raise
            raise ValueError(
                f"{self.path} is damaged or cut off after record {done}: {error}; replace it"
            ) from None


@dataclass(frozen=True)
class HubSource:
    """A data set that ``datasets`` streams: OWNER/NAME on the hub, or a local folder that it
    understands."""

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
        datasets = _extra("datasets")
        datasets.disable_progress_bars()
        number = skip
        # no network, unknown name, subset or split
        try:
            rows = datasets.load_dataset(
                self.dataset, self.subset, split=self.split, streaming=True
            )
            for number, row in enumerate(rows.skip(skip) if skip else rows, start=skip + 1):
                yield _record(f"{self.name}:{number}", row, self.text_field), 0
        except MissingFieldError:
            raise
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:
            raise ValueError(
                f"{self.name} cannot be read (after record {number}): {error}"
            ) from error


class MissingFieldError(ValueError):
    """A record without the text field."""


def find_sources(
    places: Sequence[str | Path],
    *,
    text_field: str = "text",
    subset: str | None = None,
    split: str = "train",
) -> tuple[list[Source], list[str]]:
    """Sources behind ``places`` in reading order, and the files in folders that were left out for
    their suffix.

    Folders are walked in sorted order, hidden files excepted. Raises ValueError for what cannot be
    read.
    """
    found: list[Source] = []
    left_out: list[str] = []
    for place in map(str, places):
        path = Path(place)
        if place.startswith("hub:"):
            found.append(HubSource(place.removeprefix("hub:"), subset, split, text_field))
        elif path.is_dir():
            inside = [
                p
                for p in sorted(path.rglob("*"))
                if p.is_file() and not _hidden(p.relative_to(path))
            ]
            known = [p for p in inside if _kind(p)]
            if not known:
                suffixes = (
                    ", ".join(sorted({"".join(p.suffixes[-2:]) or p.name for p in inside}))
                    or "no files"
                )
                raise ValueError(
                    f"the folder {path} holds nothing to read, only {suffixes}; give {_READABLE}"
                )
            found += [FileSource(p, p.relative_to(path).as_posix(), text_field) for p in known]
            left_out += [str(p) for p in inside if not _kind(p)]
        elif not path.is_file():
            raise ValueError(f"{path} is not a file or folder; give {_READABLE}")
        elif not _kind(path):
            raise ValueError(f"{path} ends in {path.suffix!r}; give {_READABLE}")
        else:
            found.append(FileSource(path, path.name, text_field))
    if subset and not any(isinstance(s, HubSource) for s in found):
        raise ValueError(
            f"subset={subset!r} is for hub data sets; write hub:OWNER/NAME or leave it out"
        )
    return _with_own_names(found), left_out


def _with_own_names(sources: list[Source]) -> list[Source]:
    """Files of equal names are named by their paths. Raises ValueError if a source is given
    twice."""
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


def _kind(path: Path) -> str:
    """.jsonl, .txt.gz, ...; empty if it cannot be read."""
    suffixes = path.suffixes
    if (
        suffixes[-1:]
        and suffixes[-1] in PACKINGS
        and suffixes[-2:-1]
        and suffixes[-2] in (".txt", ".jsonl")
    ):
        return "".join(suffixes[-2:])
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""


def read_documents(path: str | Path, text_field: str = "text") -> list[Document]:
    """All documents of a file, folder or hub data set, in memory. Broken records are a warning with
    their count."""
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
    """A number in [0, 1) that depends on a document's name alone: below the validation share it is
    held out."""
    return (
        int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64
    )


def _extra(module: str) -> ModuleType:
    with extra("data", needed_for="this kind of source"):
        return importlib.import_module(module)


def damage_errors() -> tuple[type[Exception], ...]:
    """Exceptions of those optional libraries that are loaded: an unloaded one cannot have
    raised."""
    found: list[type[Exception]] = []
    if zstandard := sys.modules.get("zstandard"):
        found.append(zstandard.ZstdError)
    if arrow := sys.modules.get("pyarrow"):
        found += [arrow.ArrowException, OSError]  # pyarrow reports damaged pages as a bare OSError
    return tuple(found)


def _record(name: str, fields: Any, text_field: str) -> Record:
    """The record that parsed JSON or a row makes. Raises MissingFieldError."""
    if not isinstance(fields, dict):
        return Record(name, "", f"is not an object with fields but {type(fields).__name__}")
    if text_field not in fields:
        raise MissingFieldError(
            f"{name} has no field {text_field!r}; it has {', '.join(fields) or 'none'}: choose one "
            "with --text-field"
        )
    text = fields[text_field]
    if text is None:
        return Record(name, "")
    if not isinstance(text, str):
        return Record(name, "", f"has {type(text).__name__} in field {text_field!r}, not text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return Record(name, "", f"is not valid Unicode: {error.reason}")
    return Record(name, text)


def _read_jsonl(source: FileSource, skip: int) -> Iterator[tuple[Record, int]]:
    with source.path.open("rb") as file:
        for number, line in enumerate(
            itertools.islice(unpacked_lines(source.path, file), skip, None), start=skip + 1
        ):
            yield _parse_line(f"{source.name}:{number}", line, source.text_field), file.tell()


def _parse_line(name: str, line: bytes, text_field: str) -> Record:
    if not line.strip():
        return Record(name, "")
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Record(name, "", f"is not valid UTF-8: {error.reason} at byte {error.start + 1}")
    except (ValueError, RecursionError) as error:
        return Record(name, "", f"is not valid JSON: {error}")
    return _record(name, fields, text_field)


def _read_text(source: FileSource, skip: int) -> Iterator[tuple[Record, int]]:
    """Pieces of about 4,000 characters, cut at blank lines; lines that are not UTF-8 come out as
    broken."""
    with source.path.open("rb") as file:
        pieces = _pieces(source.name, unpacked_lines(source.path, file))
        yield from ((record, file.tell()) for record in itertools.islice(pieces, skip, None))


def _pieces(name: str, lines: Iterator[bytes]) -> Iterator[Record]:
    piece: list[str] = []
    size = number = 0
    for line_number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if line_number == 1 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            problem = f"is a line that is not valid UTF-8: {error.reason} at byte {error.start + 1}"
            yield Record(f"{name}, line {line_number},", "", problem)
            continue
        piece.append(text)
        size += len(text) + 1
        # A file without blank lines is cut at line ends, or it would be one document of any size.
        if size >= _LONGEST_PIECE_CHARACTERS or (size >= _PIECE_CHARACTERS and not text.strip()):
            yield Record(f"{name}:{number}", "\n".join(piece).strip())
            piece, size, number = [], 0, number + 1
    if any(p.strip() for p in piece) or not number:
        yield Record(f"{name}:{number}", "\n".join(piece).strip())


def _read_parquet(source: FileSource, skip: int) -> Iterator[tuple[Record, int]]:
    arrow, parquet = _extra("pyarrow"), _extra("pyarrow.parquet")
    size, field = source.num_bytes, source.text_field
    with parquet.ParquetFile(source.path) as file:
        if field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise MissingFieldError(
                f"{source.path} has no field {field!r}; it has {names}: choose one with "
                "--text-field"
            )
        kind = file.schema_arrow.field(field).type
        if arrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
            raise ValueError(
                f"{source.path}: field {field!r} is {kind}, not text; choose another with "
                "--text-field"
            )
        number = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if number + rows <= skip:
                number += rows
                continue
            for batch in file.iter_batches(
                256, row_groups=[group], columns=[field], use_threads=False
            ):
                column = batch.column(0)
                if arrow.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for value in column.cast(arrow.large_binary()).to_pylist():
                    number += 1
                    if number > skip:
                        yield (
                            _parse_cell(f"{source.name}:{number}", value),
                            size * number // file.metadata.num_rows,
                        )


def _parse_cell(name: str, value: bytes | None) -> Record:
    try:
        return Record(name, (value or b"").decode())
    except UnicodeDecodeError as error:
        return Record(name, "", f"is not valid UTF-8: {error.reason} at byte {error.start + 1}")


_READERS: dict[str, Callable[[FileSource, int], Iterator[tuple[Record, int]]]] = {
    ".jsonl": _read_jsonl,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}


def unpacked_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Lines of an open file, unpacked as its suffix says, without their newlines."""
    begun: list[bytes] = []
    for block in _blocks(path, file):
        first, *more = block.split(b"\n")
        begun.append(first)
        if more:
            yield b"".join(begun)
            yield from more[:-1]
            begun = [more[-1]]
    if last := b"".join(begun):
        yield last


def _blocks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _unpack_zstd(file)
        return
    stream = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
    while block := stream.read(_BLOCK_BYTES):
        yield block


def _unpack_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame, because the library's own stream reader takes a file that is cut off for a
    complete one."""
    unpacker = _extra("zstandard").ZstdDecompressor(max_window_size=2**31)
    frame = None
    while block := file.read(_BLOCK_BYTES):
        while block:
            frame = frame or unpacker.decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the compressed data ends in the middle")


def python_documents() -> list[Document]:
    """Help topics and docstrings of this Python's standard library, one document per topic and
    module.

    Gathered once per Python version and kept in the user's cache folder.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    kept = cache_folder() / f"python-{version}.jsonl"
    if kept.is_file():
        return [
            Document(**json.loads(line)) for line in kept.read_text(encoding="utf-8").splitlines()
        ]
    documents = without_repeats([*_help_topics(), *_builtin_docstrings(), *_library_docstrings()])
    try:
        with replacing(kept) as unfinished:
            unfinished.write_text(
                "".join(json.dumps(d._asdict()) + "\n" for d in documents), encoding="utf-8"
            )
    except OSError as error:  # a full disk costs a few seconds per run, nothing else
        print(f"note: could not keep the corpus in {kept}: {error}", file=sys.stderr)
    return documents


def without_repeats(documents: list[Document]) -> list[Document]:
    """Documents without paragraphs that an earlier one has: else validation would hold training
    text."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = [
            p for p in document.text.split("\n\n") if len(p.strip()) <= 40 or p.strip() not in seen
        ]
        seen |= {p.strip() for p in paragraphs}
        if text := "\n\n".join(paragraphs).strip():
            kept.append(Document(document.name, text))
    return kept


def _help_topics() -> Iterator[Document]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(f"topic:{name}", text.strip())


def _builtin_docstrings() -> Iterator[Document]:
    for name in sorted(
        {"builtins", "math", "itertools", "time", "_io", "_collections", "_functools"}
    ):
        module = importlib.import_module(name)
        texts = [module.__doc__ or ""]
        for _, thing in sorted(vars(module).items()):
            members = vars(thing).values() if isinstance(thing, type) else []
            texts += [
                d
                for d in (getattr(x, "__doc__", None) for x in (thing, *members))
                if isinstance(d, str)
            ]
        yield Document(
            f"module:{name}", "\n\n".join(dict.fromkeys(t.strip() for t in texts if len(t) > 40))
        )


def _library_docstrings() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "pydoc_data",
    }
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skipped & set(parts) or parts[0].startswith("_sysconfigdata"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # files kept broken on purpose, such as templates
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(dict.fromkeys(t for t in texts if t))
        if len(text) > 200:
            yield Document("module:" + ".".join(parts), text)
