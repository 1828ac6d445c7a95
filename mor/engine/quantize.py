"""Weights in 8 bits for serving on a CPU."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from mor.model import Transformer


def int8_weights(model: Transformer) -> Transformer:
    """A copy whose blocks and head multiply in int8; embedding, norms and routers stay as they are.

    PyTorch's dynamic quantisation: weights rounded once for each output channel, activations for each call.
    Raises ValueError for a model that is not in fp32 on the CPU.
    """
    weight = model.embedding.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ValueError(f"int8 weights need a float32 model on the CPU, got {weight.dtype} on {weight.device}")
    model = copy.deepcopy(model)
    if model.head is None:
        model.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        model.head.weight = nn.Parameter(weight.detach())
    head = nn.ModuleDict({"head": model.head})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        qconfig = torch.ao.quantization.per_channel_dynamic_qconfig
        for part in (model.prelude, model.recursions.shared_blocks, model.coda, head):
            torch.ao.quantization.quantize_dynamic(part, {nn.Linear: qconfig}, inplace=True)
    model.head = head["head"]  # type: ignore[assignment]  # a quantised Linear is no nn.Linear
    return model
