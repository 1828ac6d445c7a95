"""How an engine holds the weights of a model: as they are, in a form that suits few tokens, in
fewer and larger pieces, or in 8 bits.

D inputs · F width of the feed-forward layer · G key/value heads · H head dim · M rows · N outputs,
or heads
"""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.model.transformer import Angles, Attention, Block, FeedForward, Transformer, rotate


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


_VERSION = operator.attrgetter("_version")


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

    def _count(self) -> list[int]:
        # Two maps, since this is done in every step.
        return [*map(_VERSION, self._tensors), *map(Tensor.data_ptr, self._tensors)]


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


class PlainLinear(nn.Module):
    """A linear layer on the weight of another."""

    def __init__(self, weight_ND: Tensor) -> None:
        super().__init__()
        self.weight = weight_ND

    def forward(self, x_MD: Tensor) -> Tensor:
        return F.linear(x_MD, self.weight)


def _joined(weights: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([w.detach() for w in weights]), requires_grad=False)


class FusedAttention(nn.Module):
    """:class:`mor.model.transformer.Attention` with one product, and one rotation of queries and
    keys. Holds a copy of the weights."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.head_dim, self.o_proj = attention.head_dim, attention.o_proj
        parts = [layer.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.weight = _joined(parts)
        self.heads, self.kv_heads = (len(part) // self.head_dim for part in parts[:2])

    def project(
        self, x_MD: Tensor, angles: Angles, with_kv: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weight = self.weight if with_kv else self.weight[: self.heads * self.head_dim]
        x_MNH = F.linear(x_MD, weight).unflatten(-1, (-1, self.head_dim))
        if not with_kv:
            return rotate(x_MNH, angles), None, None
        to_rotate_MNH, v_MGH = x_MNH.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q_MNH, k_MGH = rotate(to_rotate_MNH, angles).split([self.heads, self.kv_heads], dim=1)
        return q_MNH, k_MGH, v_MGH


class FusedFeedForward(nn.Module):
    """:class:`mor.model.transformer.FeedForward` with one product for gate and up-projection. Holds
    a copy of their weights."""

    def __init__(self, feed_forward: FeedForward) -> None:
        super().__init__()
        self.down_proj = feed_forward.down_proj
        parts = [feed_forward.gate_proj.weight, feed_forward.up_proj.weight]
        self.weight = _joined(parts)

    def forward(self, x_MD: Tensor) -> Tensor:
        gate_MF, up_MF = F.linear(x_MD, self.weight).chunk(2, dim=-1)
        out_MD: Tensor = self.down_proj(F.silu(gate_MF) * up_MF)
        return out_MD


def fused(model: Transformer) -> Transformer:
    """The model in fewer and larger products, as a GPU wants them: there, starting a kernel for a
    few tokens takes about as long as running it."""
    other = with_linear(model, PlainLinear)
    for block in _blocks(other):
        block.attention = FusedAttention(block.attention)  # type: ignore[assignment]
        block.feed_forward = FusedFeedForward(block.feed_forward)  # type: ignore[assignment]
    return other


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


def compiles(device: torch.device, wish: bool | None) -> bool:
    """Whether an engine compiles. None: on CUDA, where Triton is installed."""
    if wish is None:
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return wish


def for_decoding(
    model: Transformer, quantize: str | None, *, compiled: bool = False
) -> Transformer:
    """The model as an engine runs it.

    compiled: compile what stands before and after attention. Raises ValueError if int8 is asked for
    and the model is not in fp32 on the CPU, or is to be compiled.
    """
    weight = model.embedding.weight
    fp32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if quantize == "int8":
        if not fp32_on_cpu or compiled:
            raise ValueError(
                f"int8 weights need a float32 model on the CPU, got {weight.dtype} on "
                f"{weight.device}" + ", compiled" * compiled
            )
        return with_linear(model, Int8Linear)
    if compiled:
        # Each engine of a process may need graphs of its own; past the limit, PyTorch would fail.
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 64)
        return fused(model).compile_blocks()
    if fp32_on_cpu:
        return with_linear(model, FewRowsLinear)
    return fused(model) if weight.device.type == "cuda" else model
