"""A model that gives no numbers is named, not scored.

B batch · T tokens · V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mor.model.transformer import Output


class NotFiniteError(ValueError):
    """A model that gives NaN or infinity; the message says where."""


def require_finite(model: nn.Module, values: Iterable[Tensor | None], place: str) -> None:
    """Raise NotFiniteError if a value is NaN or infinite. place: what the model was reading."""
    finite = [value.isfinite().all() for value in values if value is not None]
    if torch.stack(finite).all():  # the host waits once
        return
    broken = [name for name, weight in model.named_parameters() if not _is_finite(weight)]
    cause = f"its weight {broken[0]} holds some" if broken else "its weights are all finite"
    raise NotFiniteError(
        f"the model gives values that are not finite ({place}): {cause}; take another checkpoint"
    )


def values_of(output: Output) -> Iterable[Tensor | None]:
    """What a forward gave: loss or logits, and what its router decided by."""
    routing = output.routing
    yield output.logits_BTV if output.nll is None else output.nll
    yield from routing.memory.values()
    yield from (step.decision.causal_logit for step in routing.steps)


def _is_finite(weight: Tensor) -> bool:
    own: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return bool(own.isfinite().all())
