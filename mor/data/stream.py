"""From tokens to batches: a stream of documents cut into windows, from memory or prepared shards.

Batches are a pure function of (seed, position, rank, world size), so a run continues exactly where
it stopped.

B batch · T tokens of a window
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.filesize import decimal as in_bytes
from torch import Tensor

from mor.data.problems import Problems, Task
from mor.data.shards import checksum
from mor.data.text_bytes import TextBytes
from mor.data.word_problems import InTokens
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

    def unchecked(self) -> Part:
        """The same without reading it."""
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
        if isinstance(self.task, InTokens):
            # The last token of a problem closes it; those that fill the window are one document.
            end_BT = found.tokens_BT == self.task.tokenizer.end_of_text_id
            closes_BT = end_BT & ~F.pad(end_BT, (1, -1))
            documents_BT = documents_BT * seq_len + closes_BT.cumsum(1) - closes_BT.long()
        return Batch(found.tokens_BT, found.targets_BT, documents_BT)

    def problems(self, indices: Sequence[int], seq_len: int) -> Problems:
        """The batch, with the hops of every answer."""
        return self.task.problems(torch.tensor(indices) + self.first, seq_len)
