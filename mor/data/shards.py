"""From documents to memory-mapped token shards: in parallel, restartable, with the same bytes for
any number of workers.

A prepared directory holds the tokenizer, one pair of files per split and chunk of documents, and
manifest.json:

    train-00000.bin         tokens, uint16 or uint32; every document is its tokens and end-of-text
    train-00000.ends.npy    int64, where each document ends in it: a text may itself contain the
                            end-of-text string
    progress.jsonl          while unfinished: the settings, then one line per finished chunk
    .lock                   held by the process that prepares

The main process reads; workers tokenize and write. At most ``workers + 2`` chunks are held at a
time.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from rich.console import Console

from mor.data.manifest import FORMAT, JOURNAL, MANIFEST, SPLITS, SettingsEntry, read_manifest
from mor.data.readers import Record
from mor.data.sources import Document, Source, find_sources, in_words
from mor.data.spelling import Spelling, spelling
from mor.data.split import Divided, held_out, utf8_bytes
from mor.data.tokenizer import COMPANIONS, Tokenizer, train_bpe
from mor.files import LOCK, alone_in, naming, replacing, tidy
from mor.interruption import deaf_children
from mor.progress import ProgressBar
from mor.settings import NonNegativeInt, PositiveFloat, PositiveInt, Settings

SHOWN_PROBLEMS = 20
"""Broken records that the manifest names; all are counted."""
_ENCODED_AT_ONCE = 1 << 19  # characters; bounds what the tokenizer library holds per worker


class PrepareConfig(Settings):
    tokenizer: str = "bpe"
    """'bytes', 'bpe' (trained on the first documents), a tokenizer directory, other prepared data,
    or a hub name."""
    vocab_size: PositiveInt = 8192
    """Size of the trained BPE."""
    bpe_megabytes: PositiveFloat = 50.0
    """Text that the BPE is trained on, from the beginning."""
    text_field: str = "text"
    subset: str | None = None
    """Configuration of a hub data set, such as fineweb-edu-dedup."""
    split: str = "train"
    """Split of a hub data set."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the text that goes to a validation split: documents in the order of a hash of their
    names."""
    workers: NonNegativeInt = 0
    """Processes that tokenize; 0 is one per core."""
    chunk_megabytes: PositiveFloat = 8.0
    """Text in a chunk, which becomes one shard per split."""


@dataclass
class Chunk:
    """Consecutive documents. next_place: (source, record) where the next chunk begins."""

    number: int
    documents: list[Document] = field(default_factory=list)
    splits: dict[str, list[Document]] = field(default_factory=dict)
    empty: int = 0
    broken: int = 0
    problems: list[str] = field(default_factory=list)
    next_place: tuple[int, int] = (0, 0)
    size: int = 0
    """Characters; a record without text counts as 100, so that many of them fill a chunk, too."""
    bytes_read: int = 0

    def divide(self, share: float, before: Divided) -> Divided:
        """Put the documents into ``splits``; returns how all text is divided with these."""
        names = [document.name for document in self.documents]
        sizes = [utf8_bytes(document.text) for document in self.documents]
        chosen, divided = held_out(names, sizes, share, before)
        for document, is_held_out in zip(self.documents, chosen, strict=True):
            self.splits.setdefault(SPLITS[is_held_out], []).append(document)
        self.documents = []
        return divided


Waiting = dict[Future[dict[str, Any]], Chunk]


def prepare(
    places: Sequence[str],
    out: str | Path,
    config: PrepareConfig | None = None,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Tokenize all text of ``places`` into ``out`` and return the manifest. An unfinished ``out``
    is continued.

    places: files (.txt, .jsonl, these as .gz or .zst, .parquet), folders of them, or
    hub:OWNER/NAME. Raises ValueError for sources that cannot be read, for a directory that was
    begun with other settings, sources or tokenizer, and for a full disk; what is finished stays,
    and the same call continues from there.
    """
    config, console, out = config or PrepareConfig(), console or Console(), Path(out)
    if not places:
        raise ValueError("no source was given; name a file, a folder or hub:OWNER/NAME")
    sources, left_out = find_sources(
        places, text_field=config.text_field, subset=config.subset, split=config.split
    )
    if left_out:
        console.print(f"left out in folders: {in_words(left_out)}", highlight=False, soft_wrap=True)
    _refuse_strangers(out)
    with alone_in(out, doing="preparing"):
        tidy(out)
        begun = _begun(out)
        if begun is None:
            # A wrong field or file is an error before any work, and before ``out`` is begun.
            for source in sources:
                next(source.read(), None)
        tokenizer = _tokenizer(config, sources, out, begun)
        settings = _settings(config, sources, tokenizer)
        if begun is not None:
            _refuse_changes(begun, settings, out)
        if (out / MANIFEST).is_file():
            console.print(f"{out} is complete: nothing to do", highlight=False)
            return read_manifest(out)
        if begun is None:
            _write(out / JOURNAL, json.dumps(settings).encode() + b"\n")
        _tokenize(config, sources, out, settings, console)
        manifest = _finish(out, settings, in_words(left_out))
        _warn(manifest, tokenizer, console)
        return manifest


def _refuse_strangers(out: Path) -> None:
    """Raise ValueError if a new directory holds anything that no preparation writes first."""
    if not out.is_dir() or (out / MANIFEST).is_file() or (out / JOURNAL).is_file():
        return
    first = {LOCK, "tokenizer.json", *(name.split("/")[0] for name in COMPANIONS)}
    unfinished = {path.name for path in out.glob(".*.tmp")}
    if strange := sorted({path.name for path in out.iterdir()} - first - unfinished):
        raise ValueError(
            f"{out} holds other things, such as {strange[0]}; choose an empty or new directory"
        )


def _begun(out: Path) -> dict[str, Any] | None:
    """Settings that a directory was begun or finished with."""
    begun: dict[str, Any] | None = None
    if (out / MANIFEST).is_file():
        begun = read_manifest(out)["settings"]
    elif (out / JOURNAL).is_file():
        with (
            (out / JOURNAL).open(encoding="utf-8") as journal,
            naming(f"{out / JOURNAL} is damaged, delete {out} to begin anew"),
        ):
            begun = json.loads(journal.readline())
            SettingsEntry.from_dict(begun or {})
    return begun


def _tokenizer(
    config: PrepareConfig, sources: Sequence[Source], out: Path, begun: dict[str, Any] | None
) -> Tokenizer:
    """The configured tokenizer, saved in ``out``. A BPE is trained only once."""
    trained = config.tokenizer == "bpe"
    if trained and begun is not None and begun["tokenizer"]["asked"] == _asked(config):
        return Tokenizer.load(out)
    if trained:
        tokenizer = train_bpe(_first_texts(config, sources), config.vocab_size)
    else:
        tokenizer = Tokenizer.find(config.tokenizer)
    if begun is None:
        tokenizer.save(out)
    return tokenizer


def _first_texts(config: PrepareConfig, sources: Sequence[Source]) -> Iterator[Document]:
    """The first ``bpe_megabytes`` of training text, by documents."""
    characters = config.bpe_megabytes * 1e6
    for chunk in _chunks(config, sources):
        for document in chunk.splits.get("train", []):
            if characters <= 0:
                return
            characters -= len(document.text)
            yield document


def _asked(config: PrepareConfig) -> str:
    return (
        f"bpe {config.vocab_size} {config.bpe_megabytes:g}"
        if config.tokenizer == "bpe"
        else config.tokenizer
    )


def _settings(
    config: PrepareConfig, sources: Sequence[Source], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Everything that determines the bytes of the result."""
    return {
        "format": FORMAT,
        "sources": [source.describe() for source in sources],
        "text_field": config.text_field,
        "validation_share": config.validation_share,
        "chunk_megabytes": config.chunk_megabytes,
        "tokenizer": {
            "asked": _asked(config),
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text_id": tokenizer.end_of_text_id,
        },
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
    }


def _refuse_changes(begun: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    if begun["tokenizer"]["fingerprint"] != now["tokenizer"]["fingerprint"]:
        raise ValueError(
            f"{out} was begun with the tokenizer {begun['tokenizer']['asked']!r} "
            f"({begun['tokenizer']['fingerprint']}), now it is {now['tokenizer']['asked']!r} "
            f"({now['tokenizer']['fingerprint']}); tokens of two tokenizers do not mix: choose "
            "another directory"
        )
    before, after = _states(begun), _states(now)
    changed = [
        f"{name} was {begun[name]!r}, now it is {now[name]!r}"
        for name in now
        if name not in ("tokenizer", "sources") and begun[name] != now[name]
    ]
    if list(before.items()) != list(after.items()):
        names = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
        changed.append(f"sources changed since: {', '.join(names[:5]) or 'their order'}")
    if changed:
        raise ValueError(
            f"{out} cannot be continued: {'; '.join(changed)}. Choose another directory, or delete "
            "it to begin anew"
        )


def _states(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sources by name, without their paths: these depend on the working folder."""
    return {
        source["name"]: {key: value for key, value in source.items() if key != "path"}
        for source in settings["sources"]
    }


# Reading, in the main process


def _chunks(
    config: PrepareConfig, sources: Sequence[Source], seen: Sequence[dict[str, Any]] = ()
) -> Iterator[Chunk]:
    """Chunks after those that have these rows in the journal, divided into splits."""
    place = tuple(seen[-1]["next_place"]) if seen else (0, 0)
    divided = _divided(seen)
    for chunk in _read_chunks(sources, int(config.chunk_megabytes * 1e6), len(seen), place):
        divided = chunk.divide(config.validation_share, divided)
        yield chunk


def _divided(rows: Sequence[dict[str, Any]]) -> Divided:
    sizes = [{split: shard["bytes"] for split, shard in row["splits"].items()} for row in rows]
    return Divided(
        sum(size for each in sizes for size in each.values()),
        sum(each.get("validation", 0) for each in sizes),
    )


def _read_chunks(
    sources: Sequence[Source], size: int, number: int, place: tuple[int, int]
) -> Iterator[Chunk]:
    """Chunks from ``place`` (source, record) on, of ``size`` characters or more, save the last."""
    chunk = Chunk(number)
    finished_bytes = sum(source.num_bytes or 0 for source in sources[: place[0]])
    for index in range(place[0], len(sources)):
        done = place[1] if index == place[0] else 0
        for record, read in sources[index].read(done):
            done += 1
            _take(chunk, record)
            if chunk.size >= size:
                chunk.next_place, chunk.bytes_read = (index, done), finished_bytes + read
                yield chunk
                chunk = Chunk(chunk.number + 1)
        finished_bytes += sources[index].num_bytes or 0
        chunk.next_place, chunk.bytes_read = (index, done), finished_bytes
    if chunk.documents or chunk.empty or chunk.broken:
        yield chunk


def _take(chunk: Chunk, record: Record) -> None:
    chunk.size += len(record.text) or 100
    if record.problem:
        chunk.broken += 1
        if len(chunk.problems) < SHOWN_PROBLEMS:
            chunk.problems.append(f"{record.name} {record.problem}")
    elif not record.text.strip():
        chunk.empty += 1
    else:
        chunk.documents.append(Document(record.name, record.text))


def _tokenize(
    config: PrepareConfig,
    sources: Sequence[Source],
    out: Path,
    settings: dict[str, Any],
    console: Console,
) -> None:
    """Tokenize and write every chunk that the journal does not have yet."""
    seen = _progress(out)
    workers = config.workers or os.cpu_count() or 1
    chunks = _chunks(config, sources, seen)
    waiting: Waiting = {}
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(str(out),),
    )
    try:
        watch = _Watch(console, sources, seen)
        with watch.bar, (out / JOURNAL).open("a", encoding="utf-8") as journal:
            for chunk in islice(chunks, workers + 2):
                _submit(pool, waiting, chunk, settings)
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    row = _row(waiting.pop(future), future.result())
                    journal.write(json.dumps(row) + "\n")
                    journal.flush()
                    os.fsync(journal.fileno())
                    watch.add(row)
                    if (following := next(chunks, None)) is not None:
                        _submit(pool, waiting, following, settings)
    except OSError as error:
        raise ValueError(
            f"could not write to {out}: {error}. What is finished stays; make room and run the "
            "same command again"
        ) from error
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that tokenizes was ended from outside, perhaps for lack of memory. What is "
            "finished stays; run the same command again, with fewer --workers"
        ) from error
    except KeyboardInterrupt:
        console.print(
            f"interrupted: the same command continues {out} where it stopped", highlight=False
        )
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor, waiting: Waiting, chunk: Chunk, settings: dict[str, Any]
) -> None:
    texts = {split: [d.text for d in documents] for split, documents in chunk.splits.items()}
    with deaf_children():
        future = pool.submit(_write_shards, chunk.number, texts, settings["dtype"])
    chunk.splits = {}  # the pool holds them now, and drops them when they are done
    waiting[future] = chunk


def _row(chunk: Chunk, splits: dict[str, Any]) -> dict[str, Any]:
    return {
        "chunk": chunk.number,
        "splits": splits,
        "empty": chunk.empty,
        "broken": chunk.broken,
        "problems": chunk.problems,
        "next_place": chunk.next_place,
        "bytes_read": chunk.bytes_read,
    }


def _journal(out: Path) -> list[dict[str, Any]]:
    """Rows of finished chunks, in order, before the first missing one; a line that is cut off or
    damaged is none."""
    with (out / JOURNAL).open(encoding="utf-8") as journal:
        lines = [line for line in journal if line.endswith("\n")][1:]
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            rows[row["chunk"]] = row
    return [rows[i] for i in range(next(i for i in range(len(rows) + 1) if i not in rows))]


def _progress(out: Path) -> list[dict[str, Any]]:
    """The rows of the journal, which is cut to exactly these."""
    rows = _journal(out)
    with (out / JOURNAL).open(encoding="utf-8") as journal:
        header = journal.readline()
    _write(out / JOURNAL, (header + "".join(json.dumps(row) + "\n" for row in rows)).encode())
    return rows


def _finish(out: Path, settings: dict[str, Any], left_out: str) -> dict[str, Any]:
    rows = _journal(out)
    found: dict[str, Any] = {"format": FORMAT, "settings": settings, "splits": {}}
    for split in SPLITS:
        shards = [row["splits"][split] for row in rows if split in row["splits"]]
        totals = {
            name: sum(shard[name] for shard in shards) for name in ("documents", "tokens", "bytes")
        }
        if shards:
            of_all = _spelling_of(shards)
            if of_all:  # an error if next to nothing could be read
                Spelling.from_dict(of_all).remark(f"the text of the {split} split")
            found["splits"][split] = {**totals, "shards": shards, "spelling": of_all}
    if not found["splits"]:
        empty, broken = (sum(row[name] for row in rows) for name in ("empty", "broken"))
        problems = next((row["problems"] for row in rows if row["problems"]), [""])
        raise ValueError(
            f"the sources hold no text: {empty} empty documents, {broken} broken records"
            + (f", the first: {problems[0]}" if broken else "")
        )
    found |= {name: sum(row[name] for row in rows) for name in ("empty", "broken")}
    found["problems"] = [problem for row in rows for problem in row["problems"]][:SHOWN_PROBLEMS]
    found["left_out"] = left_out
    _write(out / MANIFEST, json.dumps(found, indent=1).encode())
    (out / JOURNAL).unlink()
    return found


def _spelling_of(shards: list[dict[str, Any]]) -> dict[str, Any] | None:
    """That of the shards together; None if mor 0.1.0 wrote one of them."""
    found = [shard.get("spelling") for shard in shards]
    if None in found:
        return None
    return sum((Spelling.from_dict(each) for each in found if each), Spelling()).plain()


def _warn(manifest: dict[str, Any], tokenizer: Tokenizer, console: Console) -> None:
    """What became other than one may have expected."""
    sizes = {split: found["bytes"] for split, found in manifest["splits"].items()}
    divided = Divided(sum(sizes.values()), sizes.get("validation", 0))
    miss = divided.miss(manifest["settings"]["validation_share"])
    lost = [
        Spelling.from_dict(found["spelling"]).remark(f"the {split} split")
        for split, found in manifest["splits"].items()
        if found["spelling"]
    ]
    for note in filter(None, [miss, *tokenizer.remarks(), *lost]):
        console.print(f"warning: {note}", highlight=False, soft_wrap=True)


# Tokenizing and writing, in the workers

_tokenizer_of_worker: Tokenizer
_out_of_worker: Path


def _start_worker(out: str) -> None:
    global _tokenizer_of_worker, _out_of_worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer_of_worker, _out_of_worker = Tokenizer.load(out), Path(out)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_shards(number: int, texts: dict[str, list[str]], dtype: str) -> dict[str, Any]:
    """Write a chunk's shards; returns their entries in the manifest, by split."""
    return {
        split: _write_shard(f"{split}-{number:05d}", texts[split], dtype)
        for split in SPLITS
        if split in texts
    }


def _write_shard(name: str, texts: list[str], dtype: str) -> dict[str, Any]:
    end_of_text = [_tokenizer_of_worker.end_of_text_id]
    parts, lengths, found = [], [], Spelling()
    for batch in _batches(texts):
        documents = _tokenizer_of_worker.encode_documents(batch)
        found += spelling(_tokenizer_of_worker, batch, documents)
        for ids in documents:
            parts.append(np.array(ids + end_of_text, dtype=dtype))
            lengths.append(len(ids) + 1)
    tokens, ends = np.concatenate(parts), np.cumsum(lengths, dtype=np.int64)
    _write(_out_of_worker / f"{name}.bin", tokens)
    _write(_out_of_worker / f"{name}.ends.npy", ends)
    num_bytes = sum(map(utf8_bytes, texts))
    return {
        "name": name,
        "documents": len(texts),
        "tokens": len(tokens),
        "bytes": num_bytes,
        "sha256": checksum(tokens, ends),
        "spelling": found.plain(),
    }


def checksum(tokens: np.ndarray, ends: np.ndarray) -> str:
    """SHA-256 of token ids and document ends, as they lie in their files."""
    found = hashlib.sha256(np.ascontiguousarray(tokens).data)
    found.update(np.ascontiguousarray(ends).data)
    return found.hexdigest()


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _ENCODED_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(path: Path, content: bytes | np.ndarray) -> None:
    """Write the whole file or nothing; an array raw, or as .npy if the name says so."""
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        if path.suffix == ".npy":
            np.save(file, content)
        else:
            file.write(content if isinstance(content, bytes) else content.tobytes())


class _Watch:
    """Progress by bytes of the sources, where these are known."""

    def __init__(
        self, console: Console, sources: Sequence[Source], seen: list[dict[str, Any]]
    ) -> None:
        sizes = [source.num_bytes for source in sources]
        known = [size for size in sizes if size is not None]
        self.started, self.new_tokens = time.monotonic(), 0
        self.documents = sum(s["documents"] for row in seen for s in row["splits"].values())
        self.bytes_read = max((row["bytes_read"] for row in seen), default=0)
        if seen:
            console.print(f"continuing after {self.documents:,} documents", highlight=False)
        total = sum(known) if len(known) == len(sizes) else None
        self.bar = ProgressBar(console, "tokenizing", total=total, done=self.bytes_read)

    def add(self, row: dict[str, Any]) -> None:
        self.documents += sum(s["documents"] for s in row["splits"].values())
        self.new_tokens += sum(s["tokens"] for s in row["splits"].values())
        self.bytes_read = max(self.bytes_read, row["bytes_read"])
        rate = self.new_tokens / max(time.monotonic() - self.started, 1e-9)
        text = f"{self.documents:,} documents · {self.new_tokens:,} tokens · {rate:,.0f} tok/s"
        self.bar.update(self.bytes_read, text)
