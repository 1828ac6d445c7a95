"""Checkpoints of a run on several ranks: weights gathered, the optimizers' state in shares.

Apart from checkpoint.py, which knows no ranks and is loaded by every command: importing
torch.distributed.checkpoint takes half a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from mor import checkpoint
from mor.data.tokenizer import Tokenizer
from mor.files import replacing
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
        _quietly(state_dict_saver.save, shares, folder / checkpoint.OPTIMIZER, ranks)
        if ranks.is_first:
            checkpoint.write(folder, model.config, weights, tokenizer, progress=progress)
    ranks.wait()


def load_optimizers(
    path: Path, model: Transformer, optimizers: Sequence[Optimizer], ranks: Ranks = ALONE
) -> None:
    """Fill the optimizers of ``model`` from a checkpoint, which another number of ranks may have
    written. Every rank must call it. Raises OSError as above."""
    shares = {"optimizer": get_optimizer_state_dict(model, optimizers)}
    _quietly(state_dict_loader.load, shares, path / checkpoint.OPTIMIZER, ranks)
    set_optimizer_state_dict(model, optimizers, shares["optimizer"])


def _quietly(
    function: Callable[..., Any], shares: dict[str, Any], folder: Path, ranks: Ranks
) -> None:
    """Without the library's warnings about running in a single process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(shares, checkpoint_id=folder, no_dist=ranks.size == 1)
        except CheckpointException as error:  # not an Exception: nobody else would catch it
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"rank {rank}: {cause}") from error
