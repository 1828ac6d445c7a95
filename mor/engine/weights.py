"""How an engine holds the weights of a model: as they are, in the order that suits few tokens, or in 8 bits."""

from __future__ import annotations

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.model import Transformer


class FewRowsLinear(nn.Module):
    """A linear layer whose product is taken as ``(W @ x.T).T``: MKL shares it better among threads when x has few
    rows (1.4-1.9 times faster with two threads and 8-64 rows, benchmarks/cpu_kernels.py)."""

    def __init__(self, weight_ND: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_ND

    def forward(self, x_MD: Tensor) -> Tensor:
        return torch.mm(self.weight, x_MD.t()).t() if len(x_MD) > 1 else F.linear(x_MD, self.weight)


def few_rows(model: Transformer) -> Transformer:
    """The same model, on the same memory, with its linear layers and head computed for few tokens at a time."""
    model = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    model.head = FewRowsLinear(_parameter(model.head_weight))  # type: ignore[assignment]
    for part in (model.prelude, model.recursions.shared_blocks, model.coda):
        for module in list(part.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, FewRowsLinear(_parameter(child.weight)))
    return model


def _parameter(weight: Tensor) -> nn.Parameter:
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def int8(model: Transformer) -> Transformer:
    """A copy whose blocks and head multiply in int8; embedding, norms and routers stay as they are.

    PyTorch's dynamic quantisation: weights rounded once for each output channel, activations for each call.
    Raises ValueError for a model that is not in fp32 on the CPU.
    """
    weight = model.embedding.weight
    if not _fp32_on_cpu(weight):
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


def for_decoding(model: Transformer, quantize: str | None) -> Transformer:
    """The model as an engine runs it."""
    if quantize == "int8":
        return int8(model)
    return few_rows(model) if _fp32_on_cpu(model.embedding.weight) else model


def _fp32_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32
