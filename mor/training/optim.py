"""Parameter groups, optimizer and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from mor.model.config import Trained
from mor.training.config import OptimConfig


def trapezoid(config: OptimConfig, step: int, total: int) -> float:
    """Linear rise, plateau, linear fall; a factor of the peak rate."""
    fall_from = total * (1 - config.cooldown)
    if step < fall_from:
        return _rise(config, step, total)
    left = (total - step) / (total - fall_from)
    return config.final_lr + (1 - config.final_lr) * left


def cosine(config: OptimConfig, step: int, total: int) -> float:
    """Linear rise, then half a cosine; a factor of the peak rate."""
    start = total * config.warmup
    if step < start:
        return _rise(config, step, total)
    done = (step - start) / max(1.0, total - start)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def _rise(config: OptimConfig, step: int, total: int) -> float:
    return min(1.0, (step + 1) / max(1.0, total * config.warmup))


SCHEDULES: dict[str, Callable[[OptimConfig, int, int], float]] = {
    "trapezoid": trapezoid,
    "cosine": cosine,
}


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Learning rate of ``step`` (from 0) in a run of ``total`` steps."""
    return config.lr * SCHEDULES[config.schedule](config, step, total)


def freeze(model: nn.Module, trained: Trained) -> None:
    """Let gradients reach these parts of the model alone."""
    parts = {
        "added": (".deepening.", ".lora_A.", ".lora_B.", ".router."),
        "block": ("recursions.",),
        "all": ("",),
    }[trained]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of the layers and AdamW for the rest.

    Matrices decay, norms do not. Muon's updates are scaled to the size of AdamW's (Moonlight, arXiv
    2502.16982), so one learning rate serves both.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inside = {
        n
        for n, p in parameters.items()
        if p.ndim == 2 and ("attention." in n or "feed_forward." in n)
    }
    muon = [parameters[n] for n in parameters if n in inside] if config.name == "muon" else []
    rest = [p for n, p in parameters.items() if not (muon and n in inside)]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    ]
    if muon:
        decay = config.weight_decay
        made.append(
            torch.optim.Muon(muon, lr=config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    return made
