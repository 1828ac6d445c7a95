"""What a frozen source says of the training text, computed once and kept on disk: the states that
leave the prelude, and the loss of every token at depth 1.

A record is known by the source, how it is computed, and the sequence itself. So other data, other
sources, other epochs and other runs share a folder, also at the same time. It saves time and that
is all: what is not there, or damaged, is computed.

B rows of the batch · T columns · D model
"""

from __future__ import annotations

import hashlib
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mor.data.stream import Batch
from mor.device import Precision, is_low
from mor.model.transformer import AdaptedLinear, Transformer

_DIGEST = 16  # bytes
_WAIT_S = 60.0  # for another process that writes


class SourceOf(NamedTuple):
    """entered_BTD: states after the prelude, rounded to half precision. nll_each: loss at depth 1
    of each packed token, (M,), that follows from them, nats."""

    entered_BTD: Tensor
    nll_each: Tensor


class SourceCache:
    """A folder with a record for each sequence, which processes may share: each adds what is
    missing. precision: that of the forwards, which decides the last digits.

    Raises ValueError if there is something else in its place.
    """

    def __init__(
        self, folder: Path, model: Transformer, seq_len: int, precision: Precision = "auto"
    ) -> None:
        self.model, self.seq_len, dim = model, seq_len, model.config.dim
        self.record = np.dtype([("nll", "<f4", (seq_len,)), ("state", "<f2", (seq_len, dim))])
        self.file, self.works = folder / "source.sqlite", True
        self.source = fingerprint(model, precision)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _ = self.nbytes
        except sqlite3.Error as error:
            raise ValueError(
                f"{self.file} cannot be used ({error}); delete it, or choose another folder"
            ) from error

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """For each use anew, so that a file that was deleted in the meantime is no trouble."""
        with closing(sqlite3.connect(self.file, timeout=_WAIT_S)) as database, database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS records (source BLOB, name BLOB, checksum BLOB, "
                "record BLOB, PRIMARY KEY (source, name))"
            )
            yield database

    @property
    def bytes_per_token(self) -> float:
        """Of what is kept."""
        return self.record.itemsize / self.seq_len

    @property
    def nbytes(self) -> int:
        """Of the records of this source."""
        asked = "SELECT COALESCE(SUM(LENGTH(record)), 0) FROM records WHERE source = ?"
        with self._database() as database:
            return int(database.execute(asked, [self.source]).fetchone()[0])

    def of(self, batch: Batch) -> SourceOf:
        """From the disk; what is not there yet is computed, and written."""
        names = _names(batch)
        found = self._read(set(names))
        # A sequence that a batch holds twice is computed once.
        first = {name: i for i, name in reversed([*enumerate(names)])}
        if new := [i for name, i in first.items() if name not in found]:
            made = dict(zip([names[i] for i in new], self._compute(batch, new), strict=True))
            found |= made
            self._add(made)
        device, rows = batch.tokens_BT.device, np.stack([found[name] for name in names])
        state = torch.from_numpy(rows["state"].copy()).to(device, torch.float32)
        return SourceOf(state, torch.from_numpy(rows["nll"].copy()).to(device).flatten())

    def _read(self, names: set[bytes]) -> dict[bytes, np.ndarray]:
        """The records that are there and whole."""
        asked, found = "SELECT checksum, record FROM records WHERE source = ? AND name = ?", {}
        if self.works:
            with self._going_on("read"), self._database() as database:
                for name in names:
                    row = database.execute(asked, [self.source, name]).fetchone()
                    if row and len(row[1]) == self.record.itemsize and row[0] == _digest(row[1]):
                        found[name] = np.frombuffer(row[1], self.record)[0]
        return found

    def _add(self, made: dict[bytes, np.ndarray]) -> None:
        rows = [(self.source, name, _digest(r.tobytes()), r.tobytes()) for name, r in made.items()]
        if self.works:
            with self._going_on("written"), self._database() as database:
                database.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", rows)

    @contextmanager
    def _going_on(self, done: str) -> Iterator[None]:
        """Trouble with the file is said once; then the run does without it."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            self.works = False
            warnings.warn(
                f"{self.file} cannot be {done} any more ({error}); from now on the source's states "
                "are computed, which takes longer",
                stacklevel=5,
            )

    @torch.no_grad()
    def _compute(self, batch: Batch, new: list[int]) -> np.ndarray:
        """Records of these rows of a batch, in a forward at depth 1. The loss is the one that
        follows from the states as they were rounded, so that no gain is one of rounding."""
        tokens_BT, made = batch.tokens_BT[new], np.zeros(len(new), self.record)
        documents_BT = None if batch.documents_BT is None else batch.documents_BT[new]
        most = torch.finfo(torch.float16).max

        def round_and_keep(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
            state = given[0].float().clamp(-most, most).half()
            made["state"] = state.view(*tokens_BT.shape, -1).cpu().numpy()
            return (state.to(given[0].dtype), *given[1:])

        hook = self.model.recursions.register_forward_pre_hook(round_and_keep)
        try:
            with without_adapters(self.model):
                output = self.model(
                    tokens_BT,
                    targets_BT=batch.targets_BT[new],
                    documents_BT=documents_BT,
                    max_depth=1,
                )
        finally:
            hook.remove()
        assert output.nll_each is not None
        made["nll"] = output.nll_each.float().view(*tokens_BT.shape).cpu().numpy()
        return made


@contextmanager
def without_adapters(model: Transformer) -> Iterator[None]:
    """The model as if its adapters were not there, also where they act at the first recursion."""
    layers = [layer for layer in model.modules() if isinstance(layer, AdaptedLinear)]
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


def _names(batch: Batch) -> list[bytes]:
    """A digest of each row: tokens, targets, and where documents begin."""
    columns = [batch.tokens_BT, batch.targets_BT]
    if batch.documents_BT is not None:
        columns.append(batch.documents_BT - batch.documents_BT[:, :1])
    rows = torch.stack(columns, dim=1).cpu().numpy()
    return [_digest(row.tobytes()) for row in rows]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def fingerprint(model: Transformer, precision: Precision) -> bytes:
    """Of the weights and settings that a forward at depth 1 depends on, and of where and how it is
    computed."""
    found, config = hashlib.blake2b(digest_size=_DIGEST), model.config
    device = model.embedding.weight.device
    plain = "tf32" if precision == "tf32" else "float32"
    computed = (device.type, "bfloat16" if is_low(device, precision) else plain)
    sizes = (config.num_heads, config.num_kv_heads, config.rope_theta, config.norm_eps)
    found.update(repr((config.prelude_layers, config.coda_layers, *sizes, *computed)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if ".lora_" not in name and ".deepening." not in name and ".router." not in name:
            found.update(name.encode())
            found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.digest()
