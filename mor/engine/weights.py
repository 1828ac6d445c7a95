"""How an engine holds the weights of a model: as they are, in a form that suits few tokens, in
fewer and larger pieces, or in 8 bits.

D inputs · F width of the feed-forward layer · G key/value heads · H head dim · M rows · N outputs,
or heads
"""

from __future__ import annotations

import copy
import importlib.util
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.model.transformer import (
    AdaptedLinear,
    Added,
    Angles,
    Attention,
    Block,
    FeedForward,
    Later,
    Recursions,
    RMSNorm,
    Transformer,
    rotate,
)

Module = TypeVar("Module", bound=nn.Module)


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
    """Notices that a model has changed: its weights, in place or by others in their place, its
    modules, or the hooks on them.

    At every look: modules, parameters, buffers and forward hooks that were put in, taken out or
    replaced, weights in new memory, and changes in place that PyTorch counts, such as an
    optimizer's. A thorough look also finds changes in place that nothing counts, such as those of
    ``parameter.data``, unless rounding hides them in the sum of a row, and other numbers and names
    that a module holds, such as ``norm.eps`` or the active adapter. It reads all weights once, as a
    token does. Looks are thorough when asked for, and else as often as keeps them below ``share``
    of the time. Raises ValueError for weights whose changes PyTorch does not count.
    """

    share = 0.02

    def __init__(self, model: Transformer) -> None:
        if any(tensor.is_inference() for tensor in _tensors(model)):
            raise ValueError(
                "the model was made under torch.inference_mode(), where PyTorch does not count "
                "changes; make or load it outside"
            )
        self.model, self._look_s = model, math.inf
        self.note()

    def note(self) -> None:
        """Take the model as it is now."""
        modules = list(self.model.modules())
        places = [d for m in modules for d in (m._modules, m._parameters, m._buffers) if d]
        self._places = cast(list[dict[str, object]], places)
        self._hooks = [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._held = list(self._in_places())
        self._tensors = _tensors(self.model)
        self._marks, self._content = self._count(), self._read()
        self._settings = list(map(_settings, modules))

    def changed(self, *, thorough: bool) -> bool:
        if not self._same_places() or self._count() != self._marks:
            return True
        waited = time.perf_counter() - self._last_s
        if not thorough and waited * self.share < self._look_s:
            return False
        settings = list(map(_settings, self.model.modules()))
        return settings != self._settings or not torch.equal(self._read(), self._content)

    def _same_places(self) -> bool:
        same_number = sum(map(len, self._places)) == len(self._held)
        return same_number and all(map(operator.is_, self._in_places(), self._held))

    def _in_places(self) -> Iterator[object]:
        return chain.from_iterable(map(dict.values, self._places))

    def _count(self) -> tuple[list[int], ...]:
        """Hooks, and versions and places of tensors. In maps, since this is done in every step."""
        return (
            list(chain.from_iterable(filter(None, self._hooks))),
            list(map(_version, self._tensors)),
            list(map(Tensor.data_ptr, self._tensors)),
        )

    def _read(self) -> Tensor:
        start = time.perf_counter()
        content = _content(self._tensors).cpu()
        self._last_s = time.perf_counter()
        self._look_s = min(self._look_s, self._last_s - start)
        return content


_version = operator.attrgetter("_version")


def _settings(module: nn.Module) -> dict[str, object]:
    """Numbers, texts and tables of them in the attributes of a module, as they are now."""
    simple = (bool, int, float, str)
    found = dict[str, object]()
    for name, value in vars(module).items():
        if isinstance(value, simple):
            found[name] = value
        elif isinstance(value, list | tuple | set) and all(isinstance(v, simple) for v in value):
            found[name] = tuple(value)
        elif isinstance(value, dict) and all(isinstance(v, simple) for v in value.values()):
            found[name] = dict(value)
    return found


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
def _content(tensors: list[Tensor]) -> Tensor:
    """A number for every row of every tensor: its product with fixed factors, all different."""
    longest = max(tensor.shape[-1] for tensor in tensors if tensor.ndim)
    factors = torch.arange(1.0, 1 + longest, device=tensors[0].device).sin()
    of_type = {dtype: factors.to(dtype) for dtype in {tensor.dtype for tensor in tensors}}
    of_type |= {dtype: factors.double() for dtype in of_type if not dtype.is_floating_point}
    numbers = []
    for tensor in tensors:
        rows = tensor if tensor.ndim > 1 else tensor.reshape(-1, 1)
        rows = rows if rows.is_floating_point() else rows.double()
        numbers.append((rows @ of_type[tensor.dtype][: rows.shape[-1]]).flatten().float())
    return torch.cat(numbers).nan_to_num()


class PlainLinear(nn.Module):
    """A linear layer on the weight of another."""

    def __init__(self, weight_ND: Tensor) -> None:
        super().__init__()
        self.weight = weight_ND

    def forward(self, x_MD: Tensor) -> Tensor:
        return F.linear(x_MD, self.weight)


class Adapted(nn.Module):
    """An :class:`mor.model.transformer.AdaptedLinear` that computes with its weight in another way.
    The adapter is the same module."""

    def __init__(self, base: nn.Module, adapted: AdaptedLinear) -> None:
        super().__init__()
        self.base, self.adapted = base, adapted

    def forward(self, x_MD: Tensor, *later: Later) -> Tensor:
        return self.adapted.adapt(self.base(x_MD), x_MD, *later)


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

    def keys_values(self, x_MD: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        x_MGH = F.linear(x_MD, self.weight[self.heads * self.head_dim :])
        k_MGH, v_MGH = x_MGH.unflatten(-1, (-1, self.head_dim)).split(self.kv_heads, dim=1)
        return rotate(k_MGH, angles), v_MGH


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
    few tokens takes about as long as running it. Parts with a way of their own stay apart."""
    other = with_linear(model, PlainLinear)
    for block in other.blocks():
        if type(block) is not Block:
            continue
        attention, feed_forward = block.attention, block.feed_forward
        if _are_plain(attention, Attention, attention.q_proj, attention.k_proj, attention.v_proj):
            block.attention = FusedAttention(attention)  # type: ignore[assignment]
        if _are_plain(feed_forward, FeedForward, feed_forward.gate_proj, feed_forward.up_proj):
            block.feed_forward = FusedFeedForward(feed_forward)  # type: ignore[assignment]
    return other


def _are_plain(part: nn.Module, kind: type[nn.Module], *layers: nn.Module) -> bool:
    return not own_way(part, kind) and all(type(layer) is PlainLinear for layer in layers)


def with_linear(model: Transformer, make: Callable[[Tensor], nn.Module]) -> Transformer:
    """The model with other linear layers in its blocks and head, in the place of those without a
    way of their own. Everything else is the original's: the same modules, so a change of their
    weights shows in both, and the same hooks.

    make: the new layer for a weight, (N, D). Compiled blocks are not inherited: they hold the old
    layers.
    """

    def part_with(part: nn.Module) -> nn.Module:
        if type(part) not in (Attention, FeedForward):
            return part
        return _copy(
            part,
            {n: layer_with(m) for n, m in part.named_children() if not own_way(m, *_LINEAR)},
        )

    def layer_with(layer: nn.Module) -> nn.Module:
        new = make(cast(Tensor, layer.weight))
        return Adapted(new, layer) if isinstance(layer, AdaptedLinear) else new

    def blocks_with(blocks: nn.ModuleList) -> nn.ModuleList:
        new = {
            name: _copy(block, {n: part_with(part) for n, part in block.named_children()})
            for name, block in blocks.named_children()
            if type(block) is Block
        }
        return _copy(blocks, new)

    shared = {"shared_blocks": blocks_with(model.recursions.shared_blocks)}
    parts: dict[str, nn.Module] = {
        "prelude": blocks_with(model.prelude),
        "recursions": _copy(model.recursions, shared),
        "coda": blocks_with(model.coda),
    }
    if not _own_way_of_head(model):
        parts["head"] = make(model.head_weight)
    return _copy(model, parts)


def _copy(module: Module, parts: Mapping[str, nn.Module]) -> Module:
    """A module like this one with other parts, which shares whatever else it has."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    for name, part in parts.items():
        setattr(other, name, part)
    return other


def own_way(module: nn.Module, *kinds: type[nn.Module]) -> str:
    """What a module does that another of its kind, made of its weight alone, would not do; empty if
    there is nothing."""
    if type(module) not in kinds:
        return f"is a {type(module).__module__}.{type(module).__name__}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a forward hook"
    if vars(module).keys() & {"forward", "project", "keys_values"}:
        return "has a method of its own"
    if getattr(module, "bias", None) is not None:
        return "has a bias"
    if any(type(p) is not nn.Parameter for p in module.parameters(recurse=False)):
        return "has weights of a type of their own"
    return ""


def _own_way_of_head(model: Transformer) -> str:
    if model.head is None:
        return own_way(model.embedding, nn.Embedding)
    return own_way(model.head, nn.Linear)


def own_ways(model: Transformer) -> Iterator[tuple[str, str]]:
    """The name of each module in the blocks or the head that does not do what the model's own code
    does, and its way: adapters, hooks, parametrizations and the like."""
    for name, blocks in (
        ("prelude", model.prelude),
        ("recursions.shared_blocks", model.recursions.shared_blocks),
        ("coda", model.coda),
    ):
        for inner_name, module in blocks.named_modules(prefix=name):
            if module is not blocks and (way := own_way(module, *_KINDS)):
                yield inner_name, way
    if way := _own_way_of_head(model):
        yield "embedding" if model.head is None else "head", way


_LINEAR = (nn.Linear, AdaptedLinear)
_KINDS = (Block, Attention, FeedForward, RMSNorm, Added, *_LINEAR)


def _check_bypassed(model: Transformer) -> None:
    """Raise ValueError for what belongs to a whole forward, which an engine does in pieces."""
    for name, module, kind in (
        ("the model", model, Transformer),
        ("its part 'recursions'", model.recursions, Recursions),
    ):
        same = type(module).forward is kind.forward
        if way := own_way(module, type(module) if same else kind):
            raise ValueError(
                f"an engine does not call the forward of {name}, which {way}; remove that, or use "
                "mor.generate"
            )


def compiles(device: torch.device, wish: bool | None) -> bool:
    """Whether an engine compiles. None: on CUDA, where Triton is installed."""
    if wish is None:
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return wish


def for_decoding(
    model: Transformer, quantize: str | None, *, compiled: bool = False
) -> Transformer:
    """The model as an engine runs it. Modules with a way of their own, such as adapters, hooks and
    parametrizations, are called as they are. (A CUDA graph calls hooks when it is recorded, and
    repeats what they did to tensors.)

    compiled: compile what stands before and after attention. Raises ValueError if int8 is asked for
    and the model is not in fp32 on the CPU, is to be compiled, or has layers with a way of their
    own; and for hooks on the whole model.
    """
    _check_bypassed(model)
    weight = model.embedding.weight
    fp32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if quantize == "int8":
        if not fp32_on_cpu or compiled:
            raise ValueError(
                f"int8 weights need a float32 model on the CPU, got {weight.dtype} on "
                f"{weight.device}" + ", compiled" * compiled
            )
        for name, way in own_ways(model):
            raise ValueError(
                f"int8 weights need plain linear layers, but {name} {way}; merge the adapter or "
                "remove the hook, or leave quantize out"
            )
        return with_linear(model, Int8Linear)
    if compiled:
        return _compiled(fused(model), model)
    if fp32_on_cpu:
        return with_linear(model, FewRowsLinear)
    return fused(model) if weight.device.type == "cuda" else model


def _compiled(fused_model: Transformer, model: Transformer) -> Transformer:
    for block, original in zip(fused_model.blocks(), model.blocks(), strict=True):
        if not any(own_way(module, *_KINDS) for module in original.modules()):
            block.compile_parts()
    return fused_model
