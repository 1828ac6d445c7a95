"""What ranks hold in shares, gathered and written; apart from checkpoint.py, which every command
loads, because torch.distributed.checkpoint takes half a second to import."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from mor.model.transformer import Transformer
from mor.training.distributed import Ranks


def whole_weights(model: Transformer) -> dict[str, Any]:
    """The weights by name, on the CPU, whole on the first rank. Every rank must call it."""
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def save_optimizers(
    folder: Path, model: Transformer, optimizers: Sequence[Optimizer], ranks: Ranks
) -> None:
    """Write the optimizers' state, every rank its share. Raises OSError with what went wrong on a
    rank."""
    shares = {"optimizer": get_optimizer_state_dict(model, optimizers)}
    _quietly(dcp.save, shares, checkpoint_id=folder, no_dist=ranks.size == 1)


def load_optimizers(
    folder: Path, model: Transformer, optimizers: Sequence[Optimizer], ranks: Ranks
) -> None:
    """Fill the optimizers; another number of ranks may have written them. Raises OSError as
    above."""
    shares = {"optimizer": get_optimizer_state_dict(model, optimizers)}
    _quietly(dcp.load, shares, checkpoint_id=folder, no_dist=ranks.size == 1)
    set_optimizer_state_dict(model, optimizers, shares["optimizer"])


def _quietly(function: Callable[..., Any], *arguments: Any, **settings: Any) -> None:
    """Without the library's notes on running in a single process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(*arguments, **settings)
        except CheckpointException as error:  # no Exception, so that nobody else would catch it
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"rank {rank}: {cause}") from error
