"""Recursive and MoR models that start from the layers of a pretrained one."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from mor.conversion.layers import plain_layers
from mor.model.config import ModelConfig, Sharing
from mor.model.transformer import Transformer

Init = Literal["stepwise", "average", "lower", "upper", "random"]

# What an initialisation keeps of the source.
_KEPT = (
    "vocab_size",
    "dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_dim",
    "rope_theta",
    "norm_eps",
    "tie_embeddings",
)


def layer_sources(config: ModelConfig, num_source_layers: int, init: Init) -> list[tuple[int, ...]]:
    """Which source layers each of the prelude, shared and coda layers starts from; () means fresh
    weights.

    The prelude takes the first source layers and the coda the last; M middle ones are left for S
    shared layers, each applied R times:

    stepwise: layer i takes number i (M-1) / (S-1), rounded to the nearest, halves up; a single
    layer takes the first.
    lower, upper: the first or last S.
    random: none.
    average: the mean of those it replaces. With S R = M these are the ones at the places where it
    is applied; at another depth source layer m stands at place m (S R - 1) / (M-1), rounded
    likewise.

    Raises ValueError if the source has too few layers.
    """
    if init not in get_args(Init):
        raise ValueError(f"init={init!r} is not known; choose from {', '.join(get_args(Init))}")
    first, shared = config.prelude_layers, config.shared_layers
    own = first + config.coda_layers
    middle = num_source_layers - own
    if shared > middle:
        raise ValueError(
            f"{own + shared} layers with weights of their own need as many in the source, which "
            f"has {num_source_layers}; lower num_layers or raise num_recursions"
        )
    chosen: dict[Init, list[tuple[int, ...]]] = {
        "stepwise": [(i,) for i in _at_intervals(shared, middle)],
        "lower": [(i,) for i in range(shared)],
        "upper": [(i,) for i in range(middle - shared, middle)],
        "random": [()] * shared,
    }
    groups = _replaced(config, middle) if init == "average" else chosen[init]
    return [
        *((i,) for i in range(first)),
        *(tuple(first + m for m in group) for group in groups),
        *((i,) for i in range(first + middle, num_source_layers)),
    ]


def _replaced(config: ModelConfig, middle: int) -> list[tuple[int, ...]]:
    """For each shared layer, the ones of ``middle`` source layers that it replaces."""
    S, R = config.shared_layers, config.num_recursions
    in_sequence = [i for i in range(S) for _ in range(R)]
    layer_at = in_sequence if config.shared_order == "sequence" else [*range(S)] * R
    places = _at_intervals(middle, S * R)
    groups = [tuple(m for m in range(middle) if layer_at[places[m]] == i) for i in range(S)]
    if not all(groups):
        raise ValueError(
            f"average: with {middle} source layers for {S} x {R} applications a shared layer would "
            "replace none; lower num_layers"
        )
    return groups


def _at_intervals(count: int, length: int) -> list[int]:
    """``count`` of 0..length-1 at regular intervals with both ends, halves rounded up; a single one
    is the first."""
    gaps = max(count - 1, 1)
    return [(2 * i * (length - 1) + gaps) // (2 * gaps) for i in range(count)]


@torch.no_grad()
def recursive_init(
    model: Transformer, config: ModelConfig, init: Init = "stepwise", *, seed: int = 0
) -> Transformer:
    """A model of ``config`` that starts from the layers of ``model`` (vanilla or recursive), chosen
    by :func:`layer_sources`.

    Embedding, final norm and head are kept; routers, and shared layers with ``random``, come from
    init_weights(seed). Raises ValueError if the configs differ in more than layers, recursions and
    routing.
    """
    for name in _KEPT:
        ours, theirs = getattr(config, name), getattr(model.config, name)
        if ours != theirs:
            raise ValueError(
                f"{name}={ours} differs from the source's {theirs}, which an initialisation keeps"
            )
    source = plain_layers(model)
    sources = layer_sources(config, len(source), init)
    made = Transformer(config).init_weights(seed).to(model.embedding.weight.dtype)
    made.embedding.load_state_dict(model.embedding.state_dict())
    made.final_norm.load_state_dict(model.final_norm.state_dict())
    if made.head is not None and model.head is not None:
        made.head.load_state_dict(model.head.state_dict())
    for block, group in zip(made.blocks(), sources, strict=True):
        if group:
            block.load_state_dict(_mean([source[i].state_dict() for i in group]))
    return made.eval()


def _mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each weight, in fp64, so that equal weights keep their value."""
    if len(states) == 1:
        return states[0]
    return {
        n: torch.stack([s[n].double() for s in states]).mean(0).to(states[0][n].dtype)
        for n in states[0]
    }


def fitting_depth(num_layers: int, num_recursions: int, sharing: Sharing) -> int:
    """The depth nearest to ``num_layers`` that the sharing scheme allows; of two, the deeper."""
    if num_recursions < 1:
        raise ValueError(f"num_recursions must be at least 1, got {num_recursions}")
    own = 2 if sharing.startswith("middle") and num_recursions > 1 else 0
    shared = (2 * (num_layers - own) + num_recursions) // (2 * num_recursions)
    return own + max(shared, 1) * num_recursions
