"""One optimizer step.

batches -> forward (top-k selection) -> LM loss + auxiliary losses -> gradients -> update

B rows of the batch · T columns
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mor import checkpoint
from mor.data.stream import Batch, DataState
from mor.device import autocast
from mor.model.loss import IGNORED
from mor.model.other_depths import ExploringRouter
from mor.model.routers import GainRouter
from mor.model.routing import Routing
from mor.model.transformer import Output, Transformer
from mor.training import sharded_state
from mor.training.config import TrainConfig, capacities_at, step_flops
from mor.training.distributed import Ranks, reducing, whole
from mor.training.optim import learning_rate
from mor.training.source_cache import SourceCache


@dataclass
class TrainState:
    """Everything that changes from step to step."""

    model: Transformer
    optimizers: list[torch.optim.Optimizer]
    ranks: Ranks
    forward: nn.Module
    """What a training step calls: the model, or what spreads it over the ranks."""
    step: int = 0
    data: DataState = field(default_factory=DataState)
    tokens: int = 0
    flops: float = 0.0
    train_s: float = 0.0
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    source: SourceCache | None = None
    """What the frozen source says of the training text, where it is kept."""

    _COUNTERS = ("step", "tokens", "flops", "train_s", "skipped")

    @property
    def progress(self) -> dict[str, Any]:
        """Plain values that say where the run is. Batches follow from it, without random state."""
        return {name: getattr(self, name) for name in self._COUNTERS} | {
            "position": self.data.position
        }

    def load(self, path: Path) -> None:
        """Continue from a checkpoint, whose weights the model has already."""
        sharded_state.load_optimizers(path, self.model, self.optimizers, self.ranks)
        saved = checkpoint.load_progress(path)
        self.data = DataState(saved["position"])
        for name in self._COUNTERS:
            setattr(self, name, saved[name])


@dataclass(frozen=True)
class StepResult:
    """loss: language-model loss, nats per token. routings: one per forward of the step."""

    loss: float
    grad_norm: float
    routings: list[Routing]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def tokens(self) -> int:
        """Of this rank."""
        return sum(len(r.tokens) for r in self.routings)

    @property
    def mean_depth(self) -> float:
        return sum(sum(r.tokens_per_recursion()) for r in self.routings) / self.tokens

    def aux_losses(self, ranks: Ranks) -> dict[str, float]:
        """Means over the forwards of the step on all ranks, without their weights."""
        names = list(self.routings[0].losses)
        if not names:
            return {}
        values = torch.stack(
            [torch.stack([r.losses[n].value.detach() for n in names]) for r in self.routings]
        )
        return dict(zip(names, ranks.mean(values.mean(0)).tolist(), strict=True))


def compute_loss(output: Output) -> Tensor:
    """What training minimises: mean language-model loss plus weighted auxiliary losses."""
    assert output.nll is not None
    return output.nll + output.routing.weighted_loss


def train_step(
    config: TrainConfig, state: TrainState, batches: Iterator[Any], total: int
) -> StepResult:
    """One optimizer step over ``config.accumulate`` batches. Where loss or gradient is not finite,
    the weights stay as they are.

    total: steps of the whole run, which the learning rate depends on.
    """
    result = _backward(config, state, batches)
    if result.is_finite:
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optim, state.step, total)
            optimizer.step()
        state.model.router.after_step(result.routings)
    else:
        state.skipped += 1
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += config.batch_size * config.accumulate * config.seq_len * state.ranks.size
    state.flops += step_flops(config, state.step - 1, state.ranks.size)
    return result


def _backward(config: TrainConfig, state: TrainState, batches: Iterator[Any]) -> StepResult:
    """Gradients of the mean loss over the step's batches, clipped."""
    device, capacities = state.ranks.device, capacities_at(config, state.step)
    routings, losses = [], []
    for i in range(config.accumulate):
        batch, state.data = next(batches)
        with reducing(state.forward, last=i == config.accumulate - 1):
            with autocast(device, config.precision):
                output = _forward(config, state, batch.to(device), capacities)
                loss = compute_loss(output)
            (loss / config.accumulate).backward()
        assert output.nll is not None
        losses.append(output.nll.detach())
        routings.append(output.routing)
    parameters = state.model.parameters()
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip))
    loss = state.ranks.mean(torch.stack(losses).mean())
    on_host = torch.stack([loss, grad_norm]).tolist()  # the one time that a step waits
    return StepResult(on_host[0], on_host[1], routings)


def _forward(
    config: TrainConfig, state: TrainState, batch: Batch, capacities: Sequence[float]
) -> Output:
    router, router_config = state.model.router, config.model.router
    learns_gains = isinstance(router, GainRouter)
    inputs: dict[str, Any] = dict(
        targets_BT=batch.targets_BT,
        documents_BT=batch.documents_BT,
        selection="topk",
        capacities=capacities,
        router=ExploringRouter(router, router_config.explore, state.step) if learns_gains else None,
    )
    known = state.source.of(batch) if state.source else None
    if known is not None:
        inputs["entered_BTD"] = known.entered_BTD
    output: Output = state.forward(batch.tokens_BT, **inputs, recompute=config.recompute)
    if isinstance(router, GainRouter):
        source_nll_M = known.nll_M if known is not None else None
        gain_RM = measured_gains(state.model, batch, output, inputs, source_nll_M)
        losses = output.routing.losses | {"gain": router.gain_loss(output.routing, gain_RM)}
        output = replace(output, routing=replace(output.routing, losses=losses))
    return output


@torch.no_grad()
def measured_gains(
    model: Transformer,
    batch: Batch,
    output: Output,
    inputs: dict[str, Any],
    source_nll_M: Tensor | None = None,
) -> Tensor:
    """By how much each recursion lowered the loss of the tokens that took it, nats, (R, M); NaN for
    those without a target. Of the first recursion nothing is known.

    The loss without a recursion is that of the same forward with all tokens capped before it.
    source_nll_M: the loss at depth 1, where it is known.
    """
    assert output.nll_M is not None
    capped = [] if source_nll_M is None else [source_nll_M]
    for depth in range(1 + len(capped), model.config.num_recursions):
        nll_M = model(batch.tokens_BT, **inputs, max_depth=depth).nll_M
        assert nll_M is not None
        capped.append(nll_M)
    nll_RM = torch.stack([*capped, output.nll_M])
    gain_RM = torch.cat([torch.full_like(nll_RM[:1], torch.nan), nll_RM[:-1] - nll_RM[1:]])
    target = batch.targets_BT.flatten()[output.routing.tokens.place]
    return gain_RM.masked_fill(target == IGNORED, torch.nan)
