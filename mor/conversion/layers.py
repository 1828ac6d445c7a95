"""A model's layers: in the order in which tokens pass them, and as they are stored."""

from __future__ import annotations

import copy

import torch
from torch import nn

from mor.model.transformer import AdaptedLinear, Transformer, passes


def unrolled_layers(model: Transformer) -> list[nn.Module]:
    """The layers in the order in which every token passes them, shared ones as often as they are
    applied.

    Raises ValueError where tokens differ in the layers they pass, or layers in what they attend to.
    """
    config = model.config
    if config.family == "mor" and not config.deepened:
        raise ValueError(
            f"this is a MoR model (router.kind={config.router.kind!r}): its tokens skip layers and "
            "its passes are gated, which a plain stack of layers cannot do; only vanilla and "
            "recursive models convert"
        )
    if config.deepened or (config.lora_rank and config.lora_from > 1):
        raise ValueError(
            "this model has re-injection, gates or adapters (deepened or lora_rank) for later "
            "recursions alone; merged into layers that the first recursion shares, they would "
            "change it too. A plain stack of layers cannot do that; convert the source it was made "
            "of"
        )
    if config.num_recursions > 1 and config.kv_strategy != "recursion_wise":
        raise ValueError(
            f"kv_strategy={config.kv_strategy!r} lets later recursions read the first one's keys, "
            "which a plain stack of layers cannot do; only kv_strategy='recursion_wise' converts"
        )
    shared = [
        model.recursions.shared_blocks[i] for _, layers in passes(model.config) for i in layers
    ]
    return [*model.prelude, *shared, *model.coda]


def plain_layers(model: Transformer) -> list[nn.Module]:
    """The same, with adapters that act at every recursion merged into them."""
    return [merged(layer) for layer in unrolled_layers(model)]


@torch.no_grad()
def merged(block: nn.Module) -> nn.Module:
    """The same layer without adapters, which become part of its weights. Without any it is the
    layer itself."""
    if not any(isinstance(layer, AdaptedLinear) for layer in block.modules()):
        return block
    plain = copy.deepcopy(block)
    for part in plain.modules():
        for name, layer in part.named_children():
            if isinstance(layer, AdaptedLinear):
                setattr(part, name, layer.merged())
    return plain


def count_parameters(model: nn.Module) -> int:
    """Parameters, each counted once."""
    return sum(p.numel() for p in model.parameters())
