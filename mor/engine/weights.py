"""How an engine holds the weights of a model: as they are, in a form that suits few tokens, or in 8
bits.

D inputs · M rows · N outputs
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.model.transformer import Block, Transformer


class FewRowsLinear(nn.Module):
    """A linear layer that computes ``(W @ x.T).T``, with x padded to a number of rows that MKL is
    good at: one row takes longer than two, and 31 longer than 32 (benchmarks/cpu_kernels.py)."""

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
    """A linear layer in 8 bits. Weights are rounded once, with a scale for each output. Inputs are
    rounded as they come, with a scale for each row, so a token's result does not depend on its
    neighbours."""

    def __init__(self, weight_ND: Tensor) -> None:
        super().__init__()
        self.scale, self.weight_ND = _rounded(weight_ND.detach())

    def forward(self, x_MD: Tensor) -> Tensor:
        scale, rounded_MD = _rounded(x_MD)
        product_MN = torch._int_mm(rounded_MD, self.weight_ND.t()).to(x_MD.dtype)
        return product_MN * scale[:, None] * self.scale


def _rounded(x_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Scale of each row, and the row in units of it, int8."""
    scale = (x_MD.abs().amax(1) / 127).clamp(min=1e-12)
    return scale, (x_MD / scale[:, None]).round().to(torch.int8)


class Watch:
    """Notices that the weights of a model have changed, in place or by others in their place.

    Changes in place that PyTorch counts, and new memory, are noticed at every look. A thorough look
    also finds new tensors, and changes that nothing counts, such as those of ``parameter.data``: it
    reads all weights once, as a token does. Raises ValueError for weights whose changes PyTorch
    does not count.
    """

    def __init__(self, model: Transformer) -> None:
        if any(tensor.is_inference() for tensor in _tensors(model)):
            raise ValueError(
                "the model was made under torch.inference_mode(), where PyTorch does not count "
                "changes; make or load it outside"
            )
        self.model = model
        self.note()

    def note(self) -> None:
        """Take the weights as they are now."""
        self._tensors = _tensors(self.model)
        self._marks, self._content = self._count(), _content(self._tensors)

    def changed(self, *, thorough: bool) -> bool:
        if self._count() != self._marks:
            return True
        if not thorough:
            return False
        now = _tensors(self.model)
        same = len(now) == len(self._tensors) and all(map(operator.is_, now, self._tensors))
        return not (same and torch.equal(_content(now), self._content))

    def _count(self) -> list[tuple[int, int]]:
        return [(tensor._version, tensor.data_ptr()) for tensor in self._tensors]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
def _content(tensors: list[Tensor]) -> Tensor:
    """A number for every row of every tensor: its product with fixed factors, all different."""
    longest = max(tensor.shape[-1] for tensor in tensors)
    factors = torch.arange(1.0, 1 + longest, device=tensors[0].device).sin()
    numbers = []
    for tensor in tensors:
        rows = tensor if tensor.ndim > 1 else tensor[:, None]
        rows = rows if rows.is_floating_point() else rows.double()
        numbers.append((rows @ factors[: rows.shape[-1]].to(rows.dtype)).flatten().float())
    return torch.cat(numbers).nan_to_num()


def with_linear(model: Transformer, make: Callable[[Tensor], nn.Module]) -> Transformer:
    """The model with other linear layers in its blocks and head. Everything else is the original's:
    the same modules, so a change of their weights shows in both.

    make: the new layer for a weight, (N, D). Compiled blocks are not inherited: they hold the old
    layers.
    """
    with torch.device("meta"):  # the structure, without memory
        other = Transformer(model.config).train(model.training)
    for part, original in ((other, model), (other.recursions, model.recursions)):
        for name, child in original.named_children():
            if not any(isinstance(inner, Block) for inner in child.modules()):
                setattr(part, name, child)  # embedding, router, final norm
    for block, original_block in zip(_blocks(other), _blocks(model), strict=True):
        for name, child in original_block.named_modules():
            if isinstance(child, nn.Linear):
                block.set_submodule(name, make(child.weight))
            elif next(child.children(), None) is None:
                block.set_submodule(name, child)  # norms
    other.head = make(model.head_weight)  # type: ignore[assignment]
    return other


def _blocks(model: Transformer) -> list[Block]:
    return [*model.prelude, *model.recursions.shared_blocks, *model.coda]


def for_decoding(model: Transformer, quantize: str | None) -> Transformer:
    """The model as an engine runs it. Raises ValueError if int8 is asked for and the model is not
    in fp32 on the CPU."""
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
