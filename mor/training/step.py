"""One optimizer step.

batches -> forward (top-k selection) -> LM loss + auxiliary losses -> gradients -> update

B rows of the batch · T columns · M packed tokens · K those with a target · R recursions · D model
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mor import checkpoint
from mor.data.stream import Batch, DataState
from mor.device import autocast
from mor.model.loss import IGNORED
from mor.model.other_depths import ExploringRouter, RepeatLastRouter
from mor.model.routers import GainRouter, Router
from mor.model.routing import AuxiliaryLoss, Exits, Routing
from mor.model.transformer import Output, Transformer
from mor.training import sharded_state
from mor.training.config import TrainConfig, capacities_at, exit_rows_at, step_flops
from mor.training.distributed import Ranks, backward, reducing, whole
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
        state.model.depth_table = None  # it was of other weights
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
    device = state.ranks.device
    routings, losses = [], []
    for i in range(config.accumulate):
        batch, state.data = next(batches)
        with reducing(state.forward, last=i == config.accumulate - 1):
            with autocast(device, config.precision):
                output = _forward(config, state, batch.to(device))
                loss = compute_loss(output)
            backward(state.forward, loss / config.accumulate)
        assert output.nll is not None
        losses.append(output.nll.detach())
        routings.append(output.routing)
    parameters = state.model.parameters()
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip))
    loss = state.ranks.mean(torch.stack(losses).mean())
    on_host = torch.stack([loss, grad_norm]).tolist()  # the one time that a step waits
    return StepResult(on_host[0], on_host[1], routings)


def _forward(config: TrainConfig, state: TrainState, batch: Batch) -> Output:
    """The forward of a step, with all that its losses need."""
    router, inputs = state.model.router, _inputs(config, state, batch)
    known = state.source.of(batch) if state.source else None
    if known is not None:
        inputs["entered_BTD"] = known.entered_BTD
    output: Output = state.forward(
        batch.tokens_BT,
        **inputs,
        exit_rows=exit_rows_at(config, state.step),
        recompute=config.recompute,
    )
    routing = output.routing
    losses = routing.losses
    if routing.exits is not None:
        exit_loss = routing.exits.nll_RK[:-1].mean()
        losses = losses | {"exits": AuxiliaryLoss(exit_loss, config.exit_weight)}
    elif isinstance(router, GainRouter):
        source_nll = known.nll_each if known is not None else None
        routing = with_capped(state.model, batch, output, inputs, source_nll)
        losses = losses | router.losses(routing)
    return replace(output, routing=replace(routing, losses=losses))


def _inputs(config: TrainConfig, state: TrainState, batch: Batch) -> dict[str, Any]:
    """Text, and how deep its tokens go, of a forward of this step."""
    capacities, trained = capacities_at(config, state.step), config.model.num_recursions
    return dict(
        targets_BT=batch.targets_BT,
        documents_BT=batch.documents_BT,
        selection="topk",
        capacities=(*capacities, *capacities[-1:] * (trained - len(capacities)))[:trained],
        max_depth=len(capacities),
        router=_router_at(config, state, len(capacities)),
    )


def _router_at(config: TrainConfig, state: TrainState, num_recursions: int) -> Router | None:
    """What decides in place of the model's router in this step."""
    router = state.model.router
    if num_recursions > router.num_recursions:
        return RepeatLastRouter(router, num_recursions)
    if isinstance(router, GainRouter):
        return ExploringRouter(router, config.model.router.explore, state.step)
    return None


@torch.no_grad()
def with_capped(
    model: Transformer,
    batch: Batch,
    output: Output,
    inputs: dict[str, Any],
    source_nll: Tensor | None = None,
) -> Routing:
    """The record of a forward with exits: what tokens lose that stop after each recursion, by the
    same forward with all tokens capped there. Without gradients.

    source_nll: the loss at depth 1, where it is known.
    """
    assert output.nll_each is not None
    capped = [] if source_nll is None else [source_nll]
    for depth in range(1 + len(capped), model.config.num_recursions):
        nll_each = model(batch.tokens_BT, **(inputs | {"max_depth": depth})).nll_each
        assert nll_each is not None
        capped.append(nll_each)
    target = batch.targets_BT.flatten()[output.routing.tokens.place]
    asked = (target != IGNORED).nonzero().squeeze(1)
    nll_RM = torch.stack([*capped, output.nll_each])
    return replace(output.routing, exits=Exits(asked, nll_RM[:, asked]))
