"""Compiled layers, where the compiler works.

B rows of the batch · T columns
"""

from __future__ import annotations

import warnings

import torch

from mor.device import Precision, autocast
from mor.model.compiling import failed_to_compile, what_failed
from mor.model.transformer import Transformer


def compile_layers(model: Transformer, precision: Precision, *, needed: bool) -> None:
    """Compile all layers, and see in a forward of some tokens that they work. If not, they stay as
    they are, with a warning. Raises ValueError if they are ``needed``."""
    device = model.embedding.weight.device
    tokens_BT = torch.zeros(2, min(32, model.config.max_seq_len), dtype=torch.long, device=device)
    try:
        with autocast(device, precision):
            model.compile_blocks()(tokens_BT, selection="topk", logits="none")
    except Exception as error:
        if not failed_to_compile(error):
            raise
        reason = f"compiling the layers failed ({what_failed(error)})"
        if needed:
            raise ValueError(f"{reason}; --compile off does without") from error
        model.as_written()
        warnings.warn(
            f"{reason}; training goes on without, which is slower. --compile off does not try",
            stacklevel=2,
        )
