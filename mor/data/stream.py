"""From tokens to batches: a stream of documents cut into windows, from memory or prepared shards.

Batches are a pure function of (seed, position, rank, world size), so a run continues exactly where
it stopped.

B batch · T tokens of a window
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.filesize import decimal as in_bytes
from torch import Tensor

from mor.data.config import BPE, BPE_VOCAB_SIZE, DataConfig
from mor.data.manifest import is_prepared, read_manifest
from mor.data.problems import PREFIX, Problems, Task, parse_task, task_tokenizer
from mor.data.python_docs import python_documents
from mor.data.shards import checksum
from mor.data.sources import Document, read_documents
from mor.data.spelling import Spelling, spells
from mor.data.split import held_out, held_out_documents, utf8_bytes
from mor.data.text_bytes import TextBytes
from mor.data.tokenizer import Tokenizer, train_bpe
from mor.data.word_problems import WORDS_PREFIX, InTokens, parse_word_task
from mor.device import moved
from mor.files import naming


@dataclass(frozen=True)
class DataState:
    """Sequences handed out so far, by all ranks together: all that is needed to continue."""

    position: int = 0


class Batch(NamedTuple):
    """All int64. documents_BT: which document each input token belongs to (see
    :meth:`TokenData.documents`); None unless requested."""

    tokens_BT: Tensor
    targets_BT: Tensor
    documents_BT: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        documents_BT = None if self.documents_BT is None else moved(self.documents_BT, device)
        return Batch(moved(self.tokens_BT, device), moved(self.targets_BT, device), documents_BT)


class Scored(NamedTuple):
    """Windows to score, by their numbers; all of one length."""

    windows: Sequence[int]
    batch: Batch


class Part(NamedTuple):
    """Consecutive tokens, and where documents end in them, in memory or mapped from a shard."""

    tokens: np.ndarray
    ends: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def open(self) -> Part:
        return self

    def checksum(self) -> str:
        return checksum(self.tokens, self.ends)


class Shard(NamedTuple):
    """A part on disk, mapped when read: there may be more shards than a process may open files.

    vocab_size: above all ids. modified: when the file was, in ns, so that one that was replaced is
    another shard. recorded: its checksum in the manifest; empty in data that mor 0.1.0 prepared.
    """

    file: Path
    dtype: str
    num_tokens: int
    vocab_size: int
    modified: int
    recorded: str = ""

    def open(self) -> Part:
        self.check()
        return _map(self)

    def check(self) -> None:
        """Raise ValueError if it is not what was prepared. Reads all of it, once per process."""
        _check(self)

    def checksum(self) -> str:
        return self.recorded or self.open().checksum()


@lru_cache(maxsize=128)
def _map(shard: Shard) -> Part:
    ends = np.load(shard.file.with_suffix(".ends.npy"), mmap_mode="r")
    return Part(np.memmap(shard.file, dtype=shard.dtype, mode="r"), ends)


@cache
def _check(shard: Shard) -> None:
    with naming(f"{shard.file} is damaged, prepare {shard.file.parent} again"):
        try:
            part = _map(shard)
        except EOFError as error:
            raise ValueError(str(error)) from None
        ends = part.ends
        if (largest := int(part.tokens.max())) >= shard.vocab_size:
            raise ValueError(f"it has the id {largest}, the tokenizer 0..{shard.vocab_size - 1}")
        if ends.ndim != 1 or ends[-1] != shard.num_tokens or (np.diff(ends, prepend=0) < 1).any():
            raise ValueError(f"its documents do not end at its {shard.num_tokens} tokens")
        if shard.recorded and shard.recorded != part.checksum():
            raise ValueError("its checksum has changed")


def evenly_spaced(count: int, total: int) -> list[int]:
    """At most ``count`` of 0..total-1, spread evenly, the first included."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _chosen(available: int, most: int | None) -> list[int]:
    if most is not None and most < 1:
        raise ValueError(f"max_windows must be at least 1, got {most}")
    return evenly_spaced(available if most is None else most, available)


Fingerprint = dict[str, str | int]


class Windows:
    """Training or validation sequences, numbered from 0."""

    def text_bytes(self, batch: Batch) -> int:
        """UTF-8 bytes of the text that the targets of a batch spell, special tokens none; 0 where
        they are no text, or the tokenizer loses some of it (see :mod:`mor.data.spelling`)."""
        raise NotImplementedError

    def describe(self) -> str:
        """How much there is, in words."""
        raise NotImplementedError

    def fingerprint(self) -> Fingerprint:
        """What tells these windows from others: names, and plain values that are equal if and only
        if the windows are."""
        raise NotImplementedError

    def num_windows(self, seq_len: int) -> int:
        """How many sequences of ``seq_len`` tokens with a target each there are."""
        raise NotImplementedError

    def num_scored(self, seq_len: int) -> int:
        """How many there are with the shorter one at the end, so that together they hold every
        target."""
        return self.num_windows(seq_len)

    def spread(self, seq_len: int, max_windows: int | None = None) -> list[int]:
        """Indices of at most ``max_windows`` windows, spread evenly over the data; None: of all.

        Raises ValueError for data shorter than a window.
        """
        return _chosen(self._available(seq_len), max_windows)

    def scored(
        self,
        seq_len: int,
        max_windows: int | None = None,
        *,
        batch_size: int = 16,
        documents: bool = False,
    ) -> Iterator[Scored]:
        """At most ``max_windows`` windows to score, spread evenly over the data; None: all of it,
        the shorter window at the end included, in a batch of its own.

        Every token but the first is a target of exactly one window, and sees the tokens before it
        in that window. Raises ValueError for data without a target.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if (available := self.num_scored(seq_len)) < 1:
            raise ValueError(
                f"the data ({self.describe()}) has no token to predict; give more text"
            )
        chosen, whole = _chosen(available, max_windows), self.num_windows(seq_len)
        full, short = ([i for i in chosen if (i < whole) == wanted] for wanted in (True, False))
        some = [full[i : i + batch_size] for i in range(0, len(full), batch_size)]
        for indices in (*some, *([short] if short else [])):
            yield Scored(indices, self.batch(indices, seq_len, documents=documents))

    def _available(self, seq_len: int) -> int:
        if (available := self.num_windows(seq_len)) < 1:
            raise ValueError(
                f"the data ({self.describe()}) holds less than one window of {seq_len + 1} tokens; "
                "lower seq_len"
            )
        return available

    def batch(self, indices: Sequence[int], seq_len: int, *, documents: bool = False) -> Batch:
        """The windows with these indices. documents: also which document each token belongs to."""
        raise NotImplementedError

    def token_counts(self, vocab_size: int, seq_len: int, max_windows: int = 4096) -> Tensor:
        """How often each token occurs in at most ``max_windows`` windows, spread evenly, (V,)."""
        batch = self.batch(self.spread(seq_len, max_windows), seq_len)
        return torch.bincount(batch.tokens_BT.flatten(), minlength=vocab_size)

    def batches(
        self,
        batch_size: int,
        seq_len: int,
        *,
        seed: int,
        state: DataState,
        rank: int = 0,
        world_size: int = 1,
        documents: bool = False,
    ) -> Iterator[tuple[Batch, DataState]]:
        """Endless batches, starting at ``state``; every epoch visits all windows in a new order.

        Together the ranks see what one process with a batch of world_size * batch_size sees. Raises
        ValueError for data shorter than a window.
        """
        per_epoch = self._available(seq_len)
        orders: dict[int, Tensor] = {}
        position = state.position
        while True:
            indices = []
            for place in range(position + rank * batch_size, position + (rank + 1) * batch_size):
                epoch, index = divmod(place, per_epoch)
                if epoch not in orders:
                    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                    orders = {epoch: torch.randperm(per_epoch, generator=generator)}
                indices.append(int(orders[epoch][index]))
            position += batch_size * world_size
            yield self.batch(indices, seq_len, documents=documents), DataState(position)


@dataclass(frozen=True)
class TokenData(Windows):
    """A token stream, every document closed by end-of-text. num_bytes: UTF-8 bytes of its text.
    bytes_by_token: those of its tokens. is_spelt: whether these are those of the text."""

    parts: Sequence[Part | Shard]
    num_documents: int
    num_bytes: int
    bytes_by_token: TextBytes
    is_spelt: bool = True

    def text_bytes(self, batch: Batch) -> int:
        return self.bytes_by_token.of(batch.tokens_BT, batch.targets_BT) if self.is_spelt else 0

    def describe(self) -> str:
        return f"{self.num_documents:,} documents, {in_bytes(self.num_bytes)}, {len(self):,} tokens"

    def fingerprint(self) -> Fingerprint:
        sums = "".join(part.checksum() for part in self.parts)
        return {
            "documents": self.num_documents,
            "tokens": len(self),
            "bytes": self.num_bytes,
            "sha256": hashlib.sha256(sums.encode()).hexdigest(),
        }

    @cached_property
    def starts(self) -> list[int]:
        """The first token of each part, and of the one that would follow the last."""
        return [0, *np.cumsum([part.num_tokens for part in self.parts]).tolist()]

    def __len__(self) -> int:
        return self.starts[-1]

    def tokens(self, start: int, stop: int) -> Tensor:
        """Tokens start..stop-1, int64."""
        pieces = [part.tokens[a:b] for part, a, b in self._stretches(start, stop)]
        return torch.from_numpy(np.concatenate(pieces).astype(np.int64))

    def documents(self, start: int, stop: int) -> Tensor:
        """Number of the document of each of these tokens, int64.

        The end-of-text token counts as the beginning of the document after it: read as an input it
        predicts that document's first token, and the last token of a text predicts it.
        """
        found, before = [], 0
        for part, a, b in self._stretches(start, stop):
            found.append(before + np.searchsorted(part.ends, np.arange(a, b) + 1, side="right"))
            before += len(part.ends)
        return torch.from_numpy(np.concatenate(found).astype(np.int64))

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """The parts that hold tokens start..stop-1, each with the range of its own tokens."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        for part, begin in zip(self.parts[first:], self.starts[first:], strict=False):
            if begin >= stop:
                return
            yield part.open(), max(start - begin, 0), min(stop - begin, part.num_tokens)

    def num_windows(self, seq_len: int) -> int:
        return (len(self) - 1) // seq_len

    def num_scored(self, seq_len: int) -> int:
        return -(-(len(self) - 1) // seq_len)

    def batch(self, indices: Sequence[int], seq_len: int, *, documents: bool = False) -> Batch:
        spans = [(i * seq_len, min((i + 1) * seq_len, len(self) - 1)) for i in indices]
        block = torch.stack([self.tokens(start, stop + 1) for start, stop in spans])
        found = torch.stack([self.documents(*span) for span in spans]) if documents else None
        return Batch(block[:, :-1].contiguous(), block[:, 1:].contiguous(), found)


@dataclass(frozen=True)
class TaskData(Windows):
    """Problems of a task, one per window. Only answers have targets."""

    task: Task | InTokens
    first: int
    """Number of the first problem."""
    count: int
    """Problems in an epoch."""

    def text_bytes(self, batch: Batch) -> int:
        return 0

    def describe(self) -> str:
        return f"{self.count:,} problems"

    def fingerprint(self) -> Fingerprint:
        return {"task": repr(self.task), "first": self.first, "problems": self.count}

    def num_windows(self, seq_len: int) -> int:
        return self.count

    def batch(self, indices: Sequence[int], seq_len: int, *, documents: bool = False) -> Batch:
        found = self.problems(indices, seq_len)
        if not documents:
            return Batch(found.tokens_BT, found.targets_BT)
        documents_BT = torch.arange(len(indices))[:, None].expand_as(found.tokens_BT)
        if isinstance(self.task, InTokens):  # the last token of a problem closes it
            ends_BT = (found.tokens_BT == self.task.tokenizer.end_of_text_id).long()
            documents_BT = documents_BT * seq_len + ends_BT.cumsum(1) - ends_BT
        return Batch(found.tokens_BT, found.targets_BT, documents_BT)

    def problems(self, indices: Sequence[int], seq_len: int) -> Problems:
        """The batch, with the hops of every answer."""
        return self.task.problems(torch.tensor(indices) + self.first, seq_len)


@dataclass(frozen=True)
class Corpus:
    tokenizer: Tokenizer
    train: Windows
    validation: Windows

    def fingerprint(self) -> Fingerprint:
        """What tells this corpus from others, by dotted names such as train.tokens: equal for equal
        tokens, wherever they lie. Reads the checksums of prepared data from its manifest."""
        found: Fingerprint = {"tokenizer": self.tokenizer.fingerprint}
        for split, data in (("train", self.train), ("validation", self.validation)):
            found |= {f"{split}.{name}": value for name, value in data.fingerprint().items()}
        return found


def what_changed(before: Mapping[str, str | int], now: Mapping[str, str | int]) -> str:
    """How a corpus differs from the one that ``before`` is the fingerprint of, in words; empty if
    it does not."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    counts = [name for name in changed if not name.endswith("sha256")]
    if changed and not counts:
        return "the text is another of the same length, or in another order"
    return ", ".join(
        f"{name} was {_shown(before, name)}, is {_shown(now, name)}" for name in counts
    )


def _shown(fingerprint: Mapping[str, str | int], name: str) -> str:
    value = fingerprint.get(name, "unknown")
    return f"{value:,}" if isinstance(value, int) else value


def load_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Read, split and tokenize text, or open prepared data or a task.

    tokenizer: that of a checkpoint, which replaces the configured one; prepared data must have been
    made with it. Raises ValueError for data that cannot be read or split, and where the
    configuration says otherwise than the data.
    """
    if tokenizer is None:
        _check_effect(config)
    found = _load_corpus(config, tokenizer)
    if tokenizer is None and config.validation_path:
        _check_apart(found, config)
    return found


def _load_corpus(config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    if config.path and config.path.startswith(PREFIX):
        return _task_corpus(config.path)
    if config.path and config.path.startswith(WORDS_PREFIX):
        return _words_corpus(config, tokenizer)
    if config.path and is_prepared(config.path):
        return _prepared_corpus(config, tokenizer)
    documents = (
        read_documents(config.path, config.text_field) if config.path else python_documents()
    )
    if config.validation_path:
        train, validation = documents, None
    else:
        train, validation = split_documents(documents, config.validation_share, of=config.share_of)
    if tokenizer is None:
        tokenizer = _make_tokenizer(config, train)
        for remark in tokenizer.remarks():
            warnings.warn(remark, stacklevel=2)
    if validation:
        held_out = tokenize(validation, tokenizer, "the validation text")
    else:
        held_out = _validation(config, tokenizer)
    return Corpus(tokenizer, tokenize(train, tokenizer, "the training text"), held_out)


_COMPARED = 64  # validation documents; the longest, of whose lengths there are few


def _check_apart(corpus: Corpus, config: DataConfig) -> None:
    """Raise ValueError if the validation text is training text; warn if some of it is."""
    train, held_out = corpus.train, corpus.validation
    assert isinstance(train, TokenData) and isinstance(held_out, TokenData)
    longest = sorted(_document_spans(held_out), key=lambda span: span[2] - span[1])[-_COMPARED:]
    texts = {_document(*span) for span in longest}
    lengths = {stop - start for _, start, stop in longest}
    both = {_document(*span) for span in _document_spans(train, lengths)} & texts
    if len(both) == len(texts):
        raise ValueError(
            f"all documents of {config.validation_path} are in the training text, "
            f"{config.path or 'the default corpus'}, too: a loss on them says nothing of other "
            "text. Leave out data.validation_path to hold out a share, or give other text"
        )
    if both:
        text = (
            f"{len(both)} of the {len(texts)} longest documents of {config.validation_path} are in "
            "the training text, too: the validation loss is too low by what was learned by heart"
        )
        warnings.warn(text, stacklevel=3)


def _document_spans(
    data: TokenData, lengths: set[int] | None = None
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Tokens of a part, and where each document begins and ends in them. lengths: only of these."""
    for part in data.parts:
        # Not opened: that would read every shard, to check it.
        tokens, ends = _map(part) if isinstance(part, Shard) else part
        starts = np.concatenate([[0], ends[:-1]])
        wanted = np.isin(ends - starts, list(lengths)) if lengths else np.ones(len(ends), bool)
        for place in np.flatnonzero(wanted):
            yield tokens, int(starts[place]), int(ends[place])


def _document(tokens: np.ndarray, start: int, stop: int) -> bytes:
    return tokens[start:stop].astype(np.uint32).tobytes()


def vocab_size(config: DataConfig) -> int:
    """Size of the vocabulary that :func:`load_corpus` would return, without reading the data. A BPE
    that is yet to be trained may come out smaller, if the text has too few different pieces."""
    if config.path and config.path.startswith(PREFIX):
        return len(parse_task(config.path).words())
    if config.path and config.path.startswith(WORDS_PREFIX):
        return _found_tokenizer(config).vocab_size
    if config.path and is_prepared(config.path):
        return Tokenizer.load(config.path).vocab_size
    if (config.tokenizer or BPE) == BPE:
        return config.vocab_size or BPE_VOCAB_SIZE
    return Tokenizer.find(config.tokenizer or BPE).vocab_size


def _check_effect(config: DataConfig) -> None:
    """Raise ValueError for settings that the data contradicts; warn of those without effect."""
    is_task = (config.path or "").startswith((PREFIX, WORDS_PREFIX))
    prepared = not is_task and config.path is not None and is_prepared(config.path)
    asked = {name: getattr(config, name) for name in ("tokenizer", "vocab_size")}
    given = {name: value for name, value in asked.items() if value is not None}
    in_words = (config.path or "").startswith(WORDS_PREFIX)
    if in_words:
        given.pop("tokenizer", None)
    if is_task and (given or config.validation_path):
        named = ", ".join(f"data.{name}" for name in given or ["validation_path"])
        has = "its own validation" if in_words else "its own tokenizer and validation"
        raise ValueError(f"{config.path} has {has}: leave out {named}")
    if prepared:
        _check_prepared(config)
    elif config.vocab_size and (config.tokenizer or BPE) != BPE:
        raise ValueError(
            f"data.vocab_size={config.vocab_size} is the size of a trained BPE; leave it out with "
            f"data.tokenizer={config.tokenizer!r}, or choose 'bpe'"
        )
    unused = set()
    if is_task or prepared or config.validation_path:
        unused.add("validation_share")
    if (config.path is None or is_task or prepared) and not config.validation_path:
        unused.add("text_field")
    for name in sorted(unused):
        if getattr(config, name) != DataConfig.__dataclass_fields__[name].default:
            place = config.path or "the default corpus"
            warnings.warn(f"data.{name} has no effect on {place} with these settings", stacklevel=4)


def _check_prepared(config: DataConfig) -> None:
    """Raise ValueError if another tokenizer is asked for than the one that the data has."""
    has = read_manifest(Path(config.path or ""))["settings"]["tokenizer"]
    if config.vocab_size not in (None, has["vocab_size"]):
        raise ValueError(
            f"data.vocab_size={config.vocab_size}, but the tokenizer of {config.path} has "
            f"{has['vocab_size']} tokens; leave it out, or prepare the data again"
        )
    if config.tokenizer is None:
        return
    same = (
        has["asked"].startswith(BPE + " ")
        if config.tokenizer == BPE
        else Tokenizer.find(config.tokenizer).fingerprint == has["fingerprint"]
    )
    if not same:
        raise ValueError(
            f"data.tokenizer={config.tokenizer!r}, but {config.path} was prepared with "
            f"{has['asked']!r}; leave it out, or prepare the data again"
        )


def _task_corpus(path: str) -> Corpus:
    task = parse_task(path)
    return Corpus(
        task_tokenizer(task.words()), TaskData(task, 1 << 16, 1 << 20), TaskData(task, 0, 512)
    )


def _words_corpus(config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    task = parse_word_task(config.path or "")
    tokenizer = tokenizer or _found_tokenizer(config)
    train, held_out = (InTokens(task, tokenizer, held_out=held) for held in (False, True))
    return Corpus(tokenizer, TaskData(train, 1 << 16, 1 << 20), TaskData(held_out, 0, 512))


def _found_tokenizer(config: DataConfig) -> Tokenizer:
    if (config.tokenizer or BPE) == BPE:
        raise ValueError(
            f"{config.path} is text for a model that can read: start from one with --init-from "
            "CHECKPOINT, or name a tokenizer with data.tokenizer ('bytes', a directory or hub name)"
        )
    return Tokenizer.find(config.tokenizer or BPE)


def _prepared_corpus(config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    folder = Path(config.path or "")
    tokenizer = tokenizer or Tokenizer.load(folder)
    train = open_shards(folder, "train", tokenizer)
    if config.validation_path:
        return Corpus(tokenizer, train, _validation(config, tokenizer))
    if "validation" not in read_manifest(folder)["splits"]:
        raise ValueError(
            f"{folder} has no validation split; set data.validation_path, or prepare it with "
            "--validation-share 0.005"
        )
    return Corpus(tokenizer, train, open_shards(folder, "validation", tokenizer))


def _validation(config: DataConfig, tokenizer: Tokenizer) -> TokenData:
    return load_tokens(config.validation_path or "", tokenizer, config.text_field)


def load_tokens(
    path: str | Path, tokenizer: Tokenizer, text_field: str = "text", split: str | None = None
) -> TokenData:
    """All text of a file or folder, or a split of prepared data; None is :func:`held_out_split`.

    Raises ValueError for a split that is not there.
    """
    if is_prepared(path):
        return open_shards(path, split or held_out_split(path), tokenizer)
    if split:
        raise ValueError(f"{path} is not prepared data, so it has no split {split!r}")
    return tokenize(read_documents(path, text_field), tokenizer, str(path))


def held_out_split(path: str | Path) -> str:
    """The validation split of prepared data, or the only one."""
    splits = read_manifest(Path(path))["splits"]
    return "validation" if "validation" in splits else "train"


def open_shards(folder: str | Path, split: str, tokenizer: Tokenizer) -> TokenData:
    """Map the shards of prepared data. Raises ValueError if another tokenizer made them."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    made_by = manifest["settings"]["tokenizer"]
    if made_by["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"{folder} was prepared with the tokenizer {made_by['asked']!r} "
            f"({made_by['fingerprint']}), not with the one of this model or run "
            f"({tokenizer.fingerprint}); prepare it again with --tokenizer MODEL_OR_RUN"
        )
    if split not in manifest["splits"]:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(manifest['splits'])}")
    found = manifest["splits"][split]
    dtype = manifest["settings"]["dtype"]
    shards = [_find_shard(folder, shard, dtype, tokenizer) for shard in found["shards"]]
    unread = CHECKED_AT_ONCE
    for shard in shards:
        if unread > 0:
            shard.check()
        unread -= shard.num_tokens
    is_spelt = _is_spelt(found.get("spelling"), tokenizer, f"the {split} split of {folder}")
    counts = found["documents"], found["bytes"]
    return TokenData(shards, *counts, tokenizer.text_bytes, is_spelt)


def _is_spelt(recorded: dict[str, Any] | None, tokenizer: Tokenizer, name: str) -> bool:
    """Whether prepared tokens spell their text, with a warning if they do not."""
    if recorded is not None:
        found = Spelling.from_dict(recorded)
        remark, is_spelt = found.remark(name), found.is_exact
    elif is_spelt := tokenizer.has_tokens_for_all:
        remark = ""
    else:
        remark = (
            f"{name} was prepared by mor 0.1.0, which did not count the text that a tokenizer has "
            "no tokens for; prepare it again to have bits per byte"
        )
    if remark:
        warnings.warn(remark, stacklevel=4)
    return is_spelt


CHECKED_AT_ONCE = 1 << 27  # tokens; the shards after these are checked when they are first read


def _find_shard(folder: Path, shard: dict[str, Any], dtype: str, tokenizer: Tokenizer) -> Shard:
    file = folder / f"{shard['name']}.bin"
    expected = shard["tokens"] * np.dtype(dtype).itemsize
    if not file.is_file() or file.stat().st_size != expected:
        raise ValueError(
            f"{file} is missing or not {expected} bytes long; delete {folder} and prepare it again"
        )
    if not (ends := file.with_suffix(".ends.npy")).is_file():
        raise ValueError(f"{ends} is missing; delete {folder} and prepare it again")
    modified = max(file.stat().st_mtime_ns, ends.stat().st_mtime_ns)
    recorded = shard.get("sha256", "")
    return Shard(file, dtype, shard["tokens"], tokenizer.vocab_size, modified, recorded)


def _make_tokenizer(config: DataConfig, train: list[Document]) -> Tokenizer:
    if (config.tokenizer or BPE) == BPE:
        return train_bpe(train, config.vocab_size or BPE_VOCAB_SIZE)
    return Tokenizer.find(config.tokenizer or BPE)


def tokenize(documents: list[Document], tokenizer: Tokenizer, name: str = "the text") -> TokenData:
    """name: what the documents are, in words. Raises ValueError if the tokenizer cannot read them,
    and warns of what it loses."""
    texts = [d.text for d in documents]
    ids = tokenizer.encode_documents(texts)
    is_spelt = spells(tokenizer, texts, ids, name)
    end = [tokenizer.end_of_text_id]
    tokens = np.concatenate([np.array(document + end, dtype=np.uint32) for document in ids])
    ends = np.cumsum([len(document) + 1 for document in ids], dtype=np.int64)
    num_bytes = sum(utf8_bytes(d.text) for d in documents)
    parts = [Part(tokens, ends)]
    return TokenData(parts, len(documents), num_bytes, tokenizer.text_bytes, is_spelt)


def split_documents(
    documents: list[Document],
    validation_share: float,
    *,
    of: Literal["bytes", "documents"] = "bytes",
) -> tuple[list[Document], list[Document]]:
    """Training and validation documents; see :func:`mor.data.split.held_out`. Warns if
    the share cannot be had."""
    if len(documents) < 2:
        raise ValueError(
            "the data holds a single document; training needs at least one more to validate on"
        )
    names, sizes = [d.name for d in documents], [utf8_bytes(d.text) for d in documents]
    if of == "documents":
        chosen = held_out_documents(names, validation_share)
    else:
        chosen, divided = held_out(names, sizes, validation_share)
        if miss := divided.miss(validation_share):
            warnings.warn(miss, stacklevel=3)
    pairs = list(zip(documents, chosen, strict=True))
    return [d for d, held in pairs if not held], [d for d, held in pairs if held]
