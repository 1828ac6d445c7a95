"""Cross-entropy of a linear head without ever holding the logits of all tokens.

With 49,152 tokens in the vocabulary the logits of a batch are many times larger than everything
else, so a chunk of them is made, turned into its share of loss and gradients, and dropped.

M tokens · D model · V vocab
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # target of a token that has nothing to predict
CHUNK_LOGITS = 1 << 25  # logits alive at a time; 128 MiB in fp32
CHUNK_LOGITS_CUDA = 1 << 28  # there a launch costs more than memory does


def linear_cross_entropy(x_MD: Tensor, weight_VD: Tensor, target: Tensor) -> Tensor:
    """Mean ``cross_entropy(x @ weight.T, target)`` in nats, over targets not ``IGNORED``."""
    return linear_cross_entropies(x_MD, weight_VD, target)[0]


def linear_cross_entropies(
    x_MD: Tensor, weight_VD: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, and the loss of each token, (M,), without gradients; 0 for targets ``IGNORED``,
    whose logits are not made on a CPU."""
    if not may_look(target.device) or (known := target != IGNORED).all():
        return _losses(x_MD, weight_VD, target)
    asked = known.nonzero().squeeze(1)
    mean, some = _losses(x_MD[asked], weight_VD, target[asked])
    return mean, some.new_zeros(len(target)).index_copy(0, asked, some)


def may_look(device: torch.device) -> bool:
    """Whether Python can look at numbers there without waiting for the device."""
    return device.type == "cpu"


def _losses(x_MD: Tensor, weight_VD: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    losses: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_MD, weight_VD, target
    )
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, while a chunk's probabilities are at hand."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_VD: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        count = (target != IGNORED).sum().clamp(min=1)
        total = torch.zeros(
            (), device=x_MD.device, dtype=torch.promote_types(x_MD.dtype, torch.float32)
        )
        each = total.new_empty(len(x_MD))
        grad_MD = torch.empty_like(x_MD) if needs_x else None
        sums = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_VD = torch.zeros_like(weight_VD, dtype=sums) if needs_weight else None
        low_VD = weight_VD.to(_precision(x_MD, weight_VD))  # once, not in every chunk
        most = CHUNK_LOGITS_CUDA if x_MD.device.type == "cuda" else CHUNK_LOGITS
        rows = max(1, most // len(weight_VD))
        for start in range(0, len(x_MD), rows):
            some = slice(start, start + rows)
            grad = None if grad_MD is None else grad_MD[some]
            x = x_MD[some].to(low_VD.dtype)
            each[some] = _chunk(x, low_VD, target[some], count, grad, grad_VD)
            total += each[some].sum()
        ctx.save_for_backward(grad_MD, None if grad_VD is None else grad_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(each)
        return total / count, each

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None]:
        grad_MD, grad_VD = ctx.saved_tensors
        return (
            None if grad_MD is None else grad_MD * scale.to(grad_MD.dtype),
            None if grad_VD is None else grad_VD * scale.to(grad_VD.dtype),
            None,
        )


def _precision(x_MD: Tensor, weight_VD: Tensor) -> torch.dtype:
    """In which the products are made: autocast's where that is on."""
    if torch.is_autocast_enabled(x_MD.device.type):
        return torch.get_autocast_dtype(x_MD.device.type)
    return torch.promote_types(x_MD.dtype, weight_VD.dtype)


def _chunk(
    x: Tensor,
    weight_VD: Tensor,
    target: Tensor,
    count: Tensor,
    grad: Tensor | None,
    grad_VD: Tensor | None,
) -> Tensor:
    """The losses of some tokens; fills their gradient and adds to that of the weight.

    A function, so that its logits are gone before the next ones are made.
    """
    logits = F.linear(x, weight_VD)
    precision, logits = logits.dtype, logits.to(torch.promote_types(logits.dtype, torch.float32))
    known, place = target != IGNORED, target.clamp(min=0)[:, None]
    log_sum = logits.logsumexp(-1, keepdim=True)
    loss = (log_sum - logits.gather(1, place))[:, 0] * known
    if grad is None and grad_VD is None:
        return loss
    # In place: at this size, passes over memory are what counts.
    error = logits.sub_(log_sum).exp_()
    error.scatter_add_(1, place, torch.full_like(log_sum, -1))
    error = error.mul_((known.to(error.dtype) / count)[:, None]).to(precision)
    if grad is not None:
        grad.copy_(error @ weight_VD)
    if grad_VD is not None:
        _add_product(grad_VD, error.T, x)
    return loss


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``: products in low precision, their sums in that of the weights."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.dtype == torch.float32 and a.device.type == "cuda":
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:  # within a chunk, sums are rounded as well
        total += a @ b
