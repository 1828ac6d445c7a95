"""Deepened models: the layers of a pretrained one, some of which may be applied again.

    prelude -> block -> (adapted block, re-injection, gate) x (R - 1) -> coda

Recursion 1 is the source. What later recursions add is zero at the start, so the deepened model
gives the source's logits, to the last bit, whoever takes them; with ``max_depth=1`` for ever,
unless the source's own weights are trained.

B rows · T columns · M tokens · D model · L layers, and the final state
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mor.conversion.layers import plain_layers, unrolled_layers
from mor.data.stream import Windows
from mor.model.config import KVStrategyName, ModelConfig, RouterConfig
from mor.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Deepening:
    """block: first layer of the source that is applied again, and the one after the last.
    lora_rank: of adapters for later recursions, 0 for none. lora_alpha: None for twice the rank.

    With ``num_recursions=1`` nothing is applied again: the adapters act in the one pass, as the
    control that tells what loops are worth. They are zero at the start as well.
    """

    block: tuple[int, int]
    num_recursions: int
    router: RouterConfig
    kv_strategy: KVStrategyName
    lora_rank: int = 0
    lora_alpha: float | None = None


def deepened_config(source: ModelConfig, how: Deepening) -> ModelConfig:
    """The settings of the deepened model. Raises ValueError for a block outside the source and for
    settings that do not fit."""
    first, end = how.block
    layers = source.num_layers
    if not 0 <= first < end <= layers:
        wrong = "has no layer" if first >= end else "is not in the source"
        raise ValueError(
            f"block {first}:{end} {wrong}: give FIRST:END with 0 <= FIRST < END <= {layers}, for "
            "layers FIRST to END - 1 of the source"
        )
    loops = how.num_recursions > 1
    if not (loops or how.lora_rank):
        raise ValueError(
            "num_recursions=1 and no adapter add nothing to the source; give one of them"
        )
    return source.replace(
        prelude_layers=first,
        shared_layers=end - first,
        coda_layers=layers - end,
        num_recursions=how.num_recursions,
        shared_order="cycle",
        kv_strategy=how.kv_strategy,
        router=how.router,
        deepened=loops,
        lora_rank=how.lora_rank,
        lora_from=2 if loops else 1,
        lora_alpha=how.lora_alpha,
    )


@torch.no_grad()
def deepen(source: Transformer, how: Deepening, *, seed: int = 0) -> Transformer:
    """The deepened model, with every weight of ``source`` and in its dtype. seed: of the router and
    of the adapters' first factors.

    Raises ValueError for a source whose layers are no plain stack, and as :func:`deepened_config`.
    """
    layers = plain_layers(source)
    config = deepened_config(source.config, how)
    made = Transformer(config).init_weights(seed).to(source.embedding.weight.dtype)
    made.embedding.load_state_dict(source.embedding.state_dict())
    made.final_norm.load_state_dict(source.final_norm.state_dict())
    if made.head is not None and source.head is not None:
        made.head.load_state_dict(source.head.state_dict())
    for block, layer in zip(made.blocks(), layers, strict=True):
        found = block.load_state_dict(layer.state_dict(), strict=False)
        new = [name for name in found.missing_keys if ".lora_" not in name]
        assert not new and not found.unexpected_keys, found
    return made.eval()


@dataclass(frozen=True, kw_only=True)
class Split:
    """A block of layers, and how far it turns a token's state: the mean angle between what goes in
    and what comes out, as a share of 180 degrees."""

    block: tuple[int, int]
    distance: float


@torch.inference_mode()
def angular_distances(
    model: Transformer, data: Windows, *, seq_len: int, max_windows: int
) -> Tensor:
    """Mean angle between the inputs of any two layers, and the state after the last one, as a share
    of 180 degrees, (L + 1, L + 1).

    The first token of a window, whose states are of another kind in most models, does not count.
    Raises ValueError for a model whose layers are no plain stack.
    """
    layers, inputs = unrolled_layers(model), list[Tensor]()
    total, tokens = torch.zeros(len(layers) + 1, len(layers) + 1, dtype=torch.float64), 0
    hooks = [
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        for layer in [*dict.fromkeys(layers), model.final_norm]
    ]
    try:
        for some in data.scored(seq_len, max_windows, batch_size=2):
            inputs.clear()
            ids_BT = some.batch.tokens_BT.to(model.embedding.weight.device)
            model(ids_BT, targets_BT=some.batch.targets_BT.to(ids_BT.device))
            state_LMD = torch.stack(inputs).unflatten(1, ids_BT.shape)[:, :, 1:].flatten(1, 2)
            unit_MLD = torch.nn.functional.normalize(state_LMD.float(), dim=-1).transpose(0, 1)
            cosine_MLL = (unit_MLD @ unit_MLD.transpose(1, 2)).clamp(-1, 1)
            total += cosine_MLL.arccos().double().sum(0).cpu() / math.pi
            tokens += len(unit_MLD)
    finally:
        for hook in hooks:
            hook.remove()
    return total / tokens


def splits(distance_LL: Tensor, block_layers: int) -> list[Split]:
    """Blocks of so many layers, those that turn states least first.

    A later recursion reads what the block gives: the nearer that is to what the block was made to
    read, the better. First and last layer stay outside: they turn ids into states and back.
    """
    layers = len(distance_LL) - 1
    if layers < 3:
        raise ValueError(
            f"a source of {layers} layers has none between its first and its last; give --block "
            f"0:{layers} to deepen all of it"
        )
    if not 1 <= block_layers <= layers - 2:
        raise ValueError(
            f"a block of {block_layers} layers does not fit between the first and the last of "
            f"{layers}; give 1 to {layers - 2}"
        )
    found = [
        Split(block=(a, a + block_layers), distance=float(distance_LL[a, a + block_layers]))
        for a in range(1, layers - block_layers)
    ]
    return sorted(found, key=lambda split: split.distance)
