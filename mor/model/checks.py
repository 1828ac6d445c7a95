"""What goes into the model and comes out of it, checked: each mistake is named, with its cure.

B rows · T columns · D model
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mor.model.config import ModelConfig
from mor.model.kv_cache import Cache
from mor.model.loss import IGNORED


def check_inputs(
    config: ModelConfig,
    tokens_BT: Tensor,
    *,
    mask_BT: Tensor | None,
    documents_BT: Tensor | None,
    targets_BT: Tensor | None,
    cache: Cache | None,
    selection: str,
    logits: str,
    entered_BTD: Tensor | None,
) -> None:
    """Raise ValueError for arguments of :meth:`mor.model.transformer.Transformer.forward` that are
    not what it says, or do not go together."""
    check_tensors(
        tokens=tokens_BT, mask_BT=mask_BT, documents_BT=documents_BT, targets_BT=targets_BT
    )
    if tokens_BT.ndim != 2 or tokens_BT.numel() == 0:
        raise ValueError(
            f"tokens must have shape (batch, length) and not be empty, got {tuple(tokens_BT.shape)}"
        )
    if tokens_BT.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens must be ids of type int64 or int32, got {tokens_BT.dtype}")
    if mask_BT is not None:
        check_mask(mask_BT)
    if targets_BT is not None:
        check_targets(targets_BT, tokens_BT.shape, config.vocab_size)
    if selection not in ("topk", "threshold"):
        raise ValueError(f"selection={selection!r} is not known; choose 'topk' or 'threshold'")
    if selection == "topk" and cache is not None:
        raise ValueError(
            "top-k compares a token with later ones and cannot decode with a cache; use "
            "selection='threshold'"
        )
    if logits not in ("all", "last", "none"):
        raise ValueError(f"logits={logits!r} is not known; choose 'all', 'last' or 'none'")
    if documents_BT is not None and (cache is not None or logits == "last"):
        raise ValueError(
            "documents_BT splits rows into several sequences; it goes with neither cache nor "
            "logits='last'"
        )
    if entered_BTD is not None and (
        cache is not None or entered_BTD.shape != (*tokens_BT.shape, config.dim)
    ):
        raise ValueError(
            "entered_BTD holds a state for each token, (batch, length, dim), and goes with no "
            f"cache; got {tuple(entered_BTD.shape)} for tokens {tuple(tokens_BT.shape)}"
        )


def check_max_depth(max_depth: Any, most: int) -> None:
    """Raise ValueError for a cap that is neither None nor a whole number in 1..most."""
    if max_depth is not None and not (type(max_depth) is int and 1 <= max_depth <= most):
        raise ValueError(f"max_depth must be a whole number in 1..{most}, got {max_depth!r}")


def check_finite(logits: Tensor) -> None:
    """Raise ValueError if any logit is NaN or infinite: no token follows from such a row."""
    if not logits.isfinite().all():
        raise ValueError(
            "the model gives logits that are not finite; its weights are broken (take another "
            f"checkpoint) or too large for {str(logits.dtype).removeprefix('torch.')}"
        )


def check_tensors(**given: Any) -> None:
    """Raise ValueError for what is there and no tensor, such as a list of lists."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(
                f"{name} must be a tensor, got a {type(value).__name__}; make one with torch.tensor"
            )


def check_mask(mask_BT: Tensor) -> None:
    """Truth values, or the numbers 0 and 1: others are biases of attention or numbers of documents,
    and mean something else."""
    truth = mask_BT.dtype == torch.bool
    if not (truth or ((mask_BT == 0) | (mask_BT == 1)).all()):
        raise ValueError(
            "a mask is true (1) at tokens and false (0) at padding; this one also has "
            f"{mask_BT[(mask_BT != 0) & (mask_BT != 1)][0].item()}. Numbers of documents go into "
            "documents_BT"
        )


def check_targets(
    targets_BT: Tensor, batch_shape: Sequence[int], vocab_size: int, name: str = "targets"
) -> None:
    """Raise ValueError for targets of another shape or type, or outside the vocabulary."""
    if tuple(targets_BT.shape) != tuple(batch_shape):
        raise ValueError(
            f"{name} have shape {tuple(targets_BT.shape)}, tokens {tuple(batch_shape)}; they must "
            "be equal"
        )
    if targets_BT.dtype != torch.int64:
        raise ValueError(f"{name} must be ids of type int64, got {targets_BT.dtype}")
    known = (targets_BT == IGNORED) | ((targets_BT >= 0) & (targets_BT < vocab_size))
    words = f"{name} must lie in 0..{vocab_size - 1}, or be {IGNORED} where there is none"
    try:  # the device checks, so that the host need not wait for it
        torch._assert_async(known.all(), words)
    except RuntimeError:
        raise ValueError(words) from None
