"""Records of text files: JSON lines, plain text and parquet, compressed or not.

Every reader is a stream: a record is in memory only while someone holds it. Records that cannot be
used (broken, empty) come out of the stream as well, so that callers can count and report them.
"""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

from mor.files import extra

KINDS = (".txt", ".jsonl", ".parquet")
PACKINGS = (".gz", ".zst")
_BLOCK_BYTES = 1 << 18
_PIECE_CHARACTERS = 4_000
_LONGEST_PIECE_CHARACTERS = 100_000


class Record(NamedTuple):
    """One entry of a source. text: blank if the entry is empty. problem: why it is broken, which
    leaves the text blank as well."""

    name: str
    text: str
    problem: str = ""


class MissingFieldError(ValueError):
    """A record without the text field."""


def kind_of(path: Path) -> str:
    """.txt, .jsonl or .parquet, compressed or not; empty if the file cannot be read."""
    *_, before, last = ("", "", *(suffix.lower() for suffix in path.suffixes))
    if last in PACKINGS:
        return before if before in (".txt", ".jsonl") else ""
    return last if last in KINDS else ""


def has_fields(path: Path) -> bool:
    """Whether records of this file have fields to choose the text from."""
    return kind_of(path) != ".txt"


def read_file(
    path: Path, *, name: str, text_field: str, skip: int = 0
) -> Iterator[tuple[Record, int]]:
    """Records after the first ``skip``, named after ``name``, each with the bytes read so far.

    Raises ValueError if the first record has no text field or the file is damaged, cannot be read
    or is of another kind than its name says, with the place.
    """
    done = skip
    try:
        _check_content(path)
        found = _READERS[kind_of(path)](path, name, text_field, skip)
        for done, record in enumerate(found, start=skip + 1):  # noqa: B007
            yield record
    except (PermissionError, FileNotFoundError) as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except damage_errors() as error:
        raise ValueError(
            f"{path} is damaged or cut off after record {done}: {error}; replace it"
        ) from None


_MAGIC = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PAR1": ".parquet",
    b"PK\x03\x04": ".zip",
    b"%PDF": ".pdf",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def _check_content(path: Path) -> None:
    """Raise ValueError for a file whose content is of another kind than its name says."""
    with path.open("rb") as file:
        start = file.read(4)
    found = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
    if found and path.suffix.lower() != found:
        raise ValueError(f"{path} has the content of a {found} file; rename or convert it")


def record_from(name: str, fields: Any, text_field: str, *, first: bool) -> Record:
    """The record that parsed JSON or a row of a table makes.

    first: of its source. Without the field, it raises MissingFieldError: the wrong one was asked
    for. A later one is broken.
    """
    if not isinstance(fields, dict):
        return Record(name, "", f"is not an object with fields but {type(fields).__name__}")
    if text_field not in fields:
        lacks = f"has no field {text_field!r}; it has {', '.join(fields) or 'none'}"
        if first:
            raise MissingFieldError(f"{name} {lacks}: choose one with --text-field")
        return Record(name, "", lacks)
    text = fields[text_field]
    if text is None:
        return Record(name, "", f"has null in field {text_field!r}")
    if not isinstance(text, str):
        return Record(name, "", f"has {type(text).__name__} in field {text_field!r}, not text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return Record(name, "", f"is not valid Unicode: {error.reason}")
    return Record(name, text)


def damage_errors() -> tuple[type[Exception], ...]:
    """What damaged files raise. Optional libraries count once they are loaded: before that they
    cannot have raised anything."""
    found: list[type[Exception]] = [EOFError, gzip.BadGzipFile, zlib.error]
    if zstandard := sys.modules.get("zstandard"):
        found.append(zstandard.ZstdError)
    if arrow := sys.modules.get("pyarrow"):
        found += [arrow.ArrowException, OSError]  # pyarrow reports damaged pages as a bare OSError
    return tuple(found)


def optional_module(module: str) -> ModuleType:
    """Raises ImportError that says what to install."""
    with extra("data", needed_for="this kind of source"):
        return importlib.import_module(module)


# JSON lines


def _read_jsonl(path: Path, name: str, text_field: str, skip: int) -> Iterator[tuple[Record, int]]:
    with path.open("rb") as file:
        lines = itertools.islice(unpacked_lines(path, file), skip, None)
        for number, line in enumerate(lines, start=skip + 1):
            record = _parse_line(f"{name}:{number}", line, text_field, first=number == 1)
            yield record, file.tell()


def _parse_line(name: str, line: bytes, text_field: str, *, first: bool) -> Record:
    if not line.strip():
        return Record(name, "")
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Record(name, "", f"is not valid UTF-8: {error.reason} at byte {error.start + 1}")
    except (ValueError, RecursionError) as error:
        return Record(name, "", f"is not valid JSON: {error}")
    return record_from(name, fields, text_field, first=first)


# Plain text


def _read_text(path: Path, name: str, text_field: str, skip: int) -> Iterator[tuple[Record, int]]:
    """Pieces of about 4,000 characters, cut at blank lines; lines that are not UTF-8 are broken."""
    with path.open("rb") as file:
        pieces = _pieces(name, unpacked_lines(path, file))
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
        if "\0" in text:
            yield Record(f"{name}, line {line_number},", "", "is a line with NUL bytes, no text")
            continue
        piece.append(text)
        size += len(text) + 1
        # A file without blank lines is cut at line ends, or it would be one document of any size.
        if size >= _LONGEST_PIECE_CHARACTERS or (size >= _PIECE_CHARACTERS and not text.strip()):
            yield Record(f"{name}:{number}", "\n".join(piece).strip("\n"))
            piece, size, number = [], 0, number + 1
    if any(p.strip() for p in piece) or not number:
        yield Record(f"{name}:{number}", "\n".join(piece).strip("\n"))


# Parquet


def _read_parquet(
    path: Path, name: str, text_field: str, skip: int
) -> Iterator[tuple[Record, int]]:
    parquet = optional_module("pyarrow.parquet")
    size = path.stat().st_size
    with parquet.ParquetFile(path) as file:
        _check_column(path, file.schema_arrow, text_field)
        number = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if number + rows <= skip:
                number += rows
                continue
            for value in _cells(file, group, text_field):
                number += 1
                if number > skip:
                    bytes_read = size * number // file.metadata.num_rows
                    yield _parse_cell(f"{name}:{number}", value, text_field), bytes_read


def _check_column(path: Path, schema: Any, field: str) -> None:
    """Raise ValueError unless the table has this column and it holds text."""
    types = optional_module("pyarrow").types
    if field not in schema.names:
        raise MissingFieldError(
            f"{path} has no field {field!r}; it has {', '.join(schema.names)}: choose one with "
            "--text-field"
        )
    kind = schema.field(field).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in ("string", "large_string", "string_view", "null"):
        raise ValueError(
            f"{path}: field {field!r} is {kind}, not text; choose another with --text-field"
        )


def _cells(file: Any, group: int, field: str) -> Iterator[bytes | None]:
    """The column of a row group, as bytes: text in parquet need not be valid UTF-8."""
    arrow = optional_module("pyarrow")
    for batch in file.iter_batches(256, row_groups=[group], columns=[field], use_threads=False):
        column = batch.column(0)
        if arrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if str(column.type) == "string_view":
            column = column.cast(arrow.binary_view())
        yield from column.cast(arrow.large_binary()).to_pylist()


def _parse_cell(name: str, value: bytes | None, field: str) -> Record:
    if value is None:
        return Record(name, "", f"has null in field {field!r}")
    try:
        return Record(name, value.decode())
    except UnicodeDecodeError as error:
        return Record(name, "", f"is not valid UTF-8: {error.reason} at byte {error.start + 1}")


_READERS: dict[str, Callable[[Path, str, str, int], Iterator[tuple[Record, int]]]] = {
    ".jsonl": _read_jsonl,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}


# Decompression


def unpacked_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Lines of an open file, decompressed as its suffix says, without their newlines."""
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
    if path.suffix.lower() == ".zst":
        yield from _unpack_zstd(file)
        return
    stream = gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file
    while block := stream.read(_BLOCK_BYTES):
        yield block


def _unpack_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: the library's own stream reader does not notice that a file is cut off."""
    unpacker = optional_module("zstandard").ZstdDecompressor(max_window_size=2**31)
    frame = None
    while block := file.read(_BLOCK_BYTES):
        while block:
            frame = frame or unpacker.decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the compressed data ends in the middle")
