"""Checkpoints of a run on several ranks: weights gathered, the optimizers' state in shares.

Apart from checkpoint.py, which knows no ranks and is loaded by every command: importing
torch.distributed.checkpoint takes half a second.

That library pickles what is no tensor. A checkpoint may come from anybody, so it is read with an
unpickler that makes plain values and the library's own records, and nothing else.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import (
    filesystem,
    state_dict_loader,
    state_dict_saver,
)
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from mor import checkpoint
from mor.data.tokenizer import Tokenizer
from mor.files import naming, replacing
from mor.model.transformer import Transformer
from mor.training.distributed import ALONE, Ranks


def save(
    path: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizers: Sequence[Optimizer],
    *,
    progress: Mapping[str, Any],
    ranks: Ranks = ALONE,
) -> None:
    """Write a checkpoint that training can continue from. Every rank must call it: the first one
    writes the whole weights, each its share of the optimizers' state.

    Raises OSError with what went wrong on a rank.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(replacing(path)) if ranks.is_first else None
        folder = ranks.from_first(folder)
        weights: dict[str, Any] = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        shares = {"optimizer": get_optimizer_state_dict(model, optimizers)}
        place = folder / checkpoint.OPTIMIZER
        _quietly(state_dict_saver.save, shares, ranks, checkpoint_id=place)
        if ranks.is_first:
            checkpoint.write(
                folder,
                model.config,
                weights,
                tokenizer,
                progress=progress,
                depth_table=model.depth_table,
            )
    ranks.wait()


def load_optimizers(
    path: Path, model: Transformer, optimizers: Sequence[Optimizer], ranks: Ranks = ALONE
) -> None:
    """Fill the optimizers of ``model`` from a checkpoint, which another number of ranks may have
    written. Every rank must call it. Raises OSError as above, ValueError if the files hold anything
    but an optimizer's state."""
    shares: dict[str, Any] = {"optimizer": get_optimizer_state_dict(model, optimizers)}
    place, states = path / checkpoint.OPTIMIZER, shares["optimizer"]["state"]
    with naming(place):
        reader = _Reader(place)
        for name in _never_stepped(states, reader.metadata):
            del states[name]
        _quietly(state_dict_loader.load, shares, ranks, storage_reader=reader, planner=_Planner())
    # What was never stepped has no state: so it is not strict.
    options = StateDictOptions(strict=False)
    set_optimizer_state_dict(model, optimizers, shares["optimizer"], options=options)


def _never_stepped(states: Mapping[str, Any], saved: records.Metadata) -> list[str]:
    """Parameters that no gradient had reached, so that the optimizers held nothing of them."""
    keys = list(saved.state_dict_metadata)
    return [
        name
        for name in states
        if not any(key.startswith(f"optimizer.state.{name}.") for key in keys)
    ]


_REFUSED = "a file in it holds more than an optimizer's state, perhaps code; it is not read"
_RECORDS: dict[tuple[str, str], Any] = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        records.BytesStorageMetadata,
        records.ChunkStorageMetadata,
        records.Metadata,
        records.MetadataIndex,
        records.StorageMeta,
        records.TensorProperties,
        records.TensorStorageMetadata,
        records._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
    )
} | {
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,  # Python 3.13
}


class _Unpickler(pickle.Unpickler):
    """Raises ValueError for anything that the library's metadata does not consist of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _RECORDS[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise ValueError(f"{_REFUSED} ({module}.{name})")


def _read_metadata(file: Path) -> records.Metadata:
    try:
        found = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{_REFUSED} ({error})") from None
    if not isinstance(found, records.Metadata):
        raise ValueError(f"{_REFUSED} ({type(found).__name__})")
    return found


class _Reader(filesystem.FileSystemReader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # Here, because the library logs what goes wrong in read_metadata as its own fault.
        self.metadata = _read_metadata(folder / ".metadata")
        self.metadata.storage_meta = records.StorageMeta(load_id=self.load_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> records.Metadata:
        return self.metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """The library unpickles numbers and flags freely; it gets a copy of plain ones."""
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(f"{_REFUSED} ({read_item.dest_index.fqn})") from None
        copy = io.BytesIO()
        torch.save(plain, copy)
        copy.seek(0)
        super().load_bytes(read_item, copy)


def _quietly(
    function: Callable[..., Any], shares: dict[str, Any], ranks: Ranks, **settings: Any
) -> None:
    """Without the library's warnings about running in a single process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(shares, no_dist=ranks.size == 1, **settings)
        except CheckpointException as error:  # not an Exception: nobody else would catch it
            rank, (cause, _) = next(iter(error.failures.items()))
            if isinstance(cause, ValueError):
                raise cause from None
            raise OSError(f"rank {rank}: {cause}") from error
