"""What a frozen source says of the training text, computed once and kept on disk: the states that
leave the prelude, and the loss of every token at depth 1.

A sequence is known by its content, so other data, other epochs and other runs of the same source
share a folder, also at the same time. A folder of another source is refused.

B rows of the batch · T columns · D model
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from mor.data.stream import Batch
from mor.files import LOCK, read_json, write_json
from mor.model.transformer import AdaptedLinear, Transformer

_DIGEST = 16  # bytes


class SourceOf(NamedTuple):
    """entered_BTD: states after the prelude, rounded to half precision. nll_each: loss at depth 1
    of each packed token, (M,), that follows from them, nats."""

    entered_BTD: Tensor
    nll_each: Tensor


class SourceCache:
    """A folder with a record for each sequence, which processes may share: each adds what is
    missing.

    Raises ValueError if it belongs to another source or to sequences of another length.
    """

    def __init__(self, folder: Path, model: Transformer, seq_len: int) -> None:
        self.model, self.seq_len, dim = model, seq_len, model.config.dim
        self.record = np.dtype([("nll", "<f4", (seq_len,)), ("state", "<f2", (seq_len, dim))])
        self.records, self.names = folder / "records.bin", folder / "names.bin"
        folder.mkdir(parents=True, exist_ok=True)
        self._adding = FileLock(folder / LOCK)
        about = {"source": fingerprint(model), "seq_len": seq_len, "dim": dim}
        file = folder / "source.json"
        with self._adding:
            before = read_json(file) if file.is_file() else about
            if changed := [name for name in about if before.get(name) != about[name]]:
                raise ValueError(
                    f"{folder} was computed for another {' and '.join(changed)} than this run's; "
                    "delete it, or choose another folder"
                )
            write_json(file, about)
            self._open()

    def _open(self) -> None:
        """Read the names of what is there. A record without a name was not finished."""
        for file in (self.records, self.names):
            file.touch()
        names = self.names.read_bytes()
        count = min(len(names) // _DIGEST, self.records.stat().st_size // self.record.itemsize)
        self.place = {names[i * _DIGEST : (i + 1) * _DIGEST]: i for i in range(count)}
        for file, size in ((self.records, self.record.itemsize), (self.names, _DIGEST)):
            if file.stat().st_size > count * size:
                with file.open("r+b") as opened:
                    opened.truncate(count * size)

    @property
    def bytes_per_token(self) -> float:
        return self.record.itemsize / self.seq_len

    @property
    def nbytes(self) -> int:
        return len(self.place) * self.record.itemsize

    def of(self, batch: Batch) -> SourceOf:
        """From the disk; what is not there yet is computed and written first."""
        names = _names(batch)
        # A sequence that a batch holds twice is computed once.
        first = {name: i for i, name in reversed([*enumerate(names)])}
        if new := [i for name, i in first.items() if name not in self.place]:
            self._add(batch, new, names)
        with self.records.open("rb") as opened:
            rows = [self._read(opened, name) for name in names]
        device, found = batch.tokens_BT.device, np.stack(rows)
        state = torch.from_numpy(found["state"].copy()).to(device, torch.float32)
        return SourceOf(state, torch.from_numpy(found["nll"].copy()).to(device).flatten())

    def _read(self, opened: Any, name: bytes) -> np.ndarray:
        opened.seek(self.place[name] * self.record.itemsize)
        found: np.ndarray = np.frombuffer(opened.read(self.record.itemsize), self.record)[0]
        return found

    @torch.no_grad()
    def _add(self, batch: Batch, new: list[int], names: list[bytes]) -> None:
        """These rows of a batch, in a forward at depth 1. The loss is the one that follows from the
        states as they were rounded, so that no gain is one of rounding."""
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
        with self._adding:
            self._open()  # others may have added the same in the meantime
            left = [(i, record) for i, record in zip(new, made, strict=True)]
            left = [(i, record) for i, record in left if names[i] not in self.place]
            with self.records.open("ab") as opened:
                opened.write(b"".join(record.tobytes() for _, record in left))
            with self.names.open("ab") as opened:
                opened.write(b"".join(names[i] for i, _ in left))
            for i, _ in left:
                self.place[names[i]] = len(self.place)


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
    return [hashlib.blake2b(row.tobytes(), digest_size=_DIGEST).digest() for row in rows]


def fingerprint(model: Transformer) -> str:
    """Of the weights and settings that a forward at depth 1 depends on."""
    found, config = hashlib.blake2b(digest_size=16), model.config
    sizes = (config.num_heads, config.num_kv_heads, config.rope_theta, config.norm_eps)
    found.update(repr((config.prelude_layers, config.coda_layers, *sizes)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if ".lora_" not in name and ".deepening." not in name and ".router." not in name:
            found.update(name.encode())
            found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
