"""How an engine holds the weights of a model: as they are, in the order that suits few tokens, or
in 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.model.transformer import Transformer


class FewRowsLinear(nn.Module):
    """A linear layer whose product is taken as ``(W @ x.T).T``, with x filled up to a number of
    rows that MKL is good
    at: one row takes longer than two, and 31 longer than 32 (benchmarks/cpu_kernels.py)."""

    def __init__(self, weight_ND: Tensor) -> None:
        super().__init__()
        self.weight = weight_ND

    def forward(self, x_MD: Tensor) -> Tensor:
        rows = len(x_MD)
        good = max(rows, 2) if rows <= 8 else -(-rows // 8) * 8
        if good > rows:
            x_MD = F.pad(x_MD, (0, 0, 0, good - rows))
        return torch.mm(self.weight, x_MD.t()).t()[:rows]


class Int8Linear(nn.Module):
    """A linear layer in 8 bits: weights rounded once with a scale for each output, inputs as they
    come with a scale for each row, so that a token's result does not depend on its neighbours."""

    def __init__(self, weight_ND: Tensor) -> None:
        super().__init__()
        self.scale_N, self.weight_ND = _rounded(weight_ND.detach())

    def forward(self, x_MD: Tensor) -> Tensor:
        scale_M, rounded_MD = _rounded(x_MD)
        return (
            torch._int_mm(rounded_MD, self.weight_ND.t()).to(x_MD.dtype)
            * scale_M[:, None]
            * self.scale_N
        )


def _rounded(x_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Scale of each row, and the row in units of it, int8."""
    scale_M = (x_MD.abs().amax(1) / 127).clamp(min=1e-12)
    return scale_M, (x_MD / scale_M[:, None]).round().to(torch.int8)


def with_linear(model: Transformer, make: Callable[[Tensor], nn.Module]) -> Transformer:
    """A model on the same memory whose blocks and head have other linear layers; embedding, norms
    and routers stay."""
    model = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    head = model.head_weight
    for block in (*model.prelude, *model.recursions.shared_blocks, *model.coda):
        # if they are compiled, it is with the layers of the original
        for name in (
            "enter",
            "leave",
        ):
            block.__dict__.pop(name, None)
    for part in (model.prelude, model.recursions.shared_blocks, model.coda):
        for module in list(part.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, make(child.weight))
    model.head = make(head)  # type: ignore[assignment]
    return model


def for_decoding(model: Transformer, quantize: str | None) -> Transformer:
    """The model as an engine runs it. Raises ValueError if int8 is asked for and it is not in fp32
    on the CPU."""
    weight = model.embedding.weight
    fp32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if quantize == "int8":
        if not fp32_on_cpu:
            raise ValueError(
                f"int8 weights need a float32 model on the CPU, got {weight.dtype} on "
                f"{weight.device}"
            )
        return with_linear(model, Int8Linear)
    return with_linear(model, FewRowsLinear) if fp32_on_cpu else model
