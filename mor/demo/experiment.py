"""Small models of several families, trained on the same data with the same FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mor.data.config import DataConfig
from mor.data.corpus import Corpus
from mor.model.config import ModelConfig, RouterConfig
from mor.model.transformer import Transformer
from mor.run_folder import RunFolder
from mor.training.config import OptimConfig, TrainConfig, step_flops
from mor.training.loop import train

# The settings that do best where depth pays; see studies/.
ROUTED: dict[str, Any] = dict(
    kv_strategy="hybrid", router=RouterConfig(kind="expert_choice", gate="residual", alpha=1.0)
)
EVALUATIONS = 8  # of each model, evenly over training


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """lr: peak learning rates by model. flops: training FLOPs of each model."""

    name: str
    data: DataConfig
    models: Mapping[str, ModelConfig]
    lr: Mapping[str, float]
    flops: float
    seq_len: int
    batch_size: int
    eval_windows: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One trained model. curve: (FLOPs, validation bits per byte) over training; empty for a
    task, whose answers are no text."""

    model: Transformer
    lr: float
    tokens: int
    flops: float
    wall_s: float
    checkpoint: Path
    curve: list[tuple[float, float]]


def train_one(
    experiment: Experiment, name: str, corpus: Corpus, out: Path, *, seed: int, console: Console
) -> Trained:
    """Train one model in ``out/EXPERIMENT/MODEL``. Raises KeyboardInterrupt if interrupted."""
    config = TrainConfig(
        model=experiment.models[name],
        data=experiment.data,
        device="cpu",
        out=str(out / experiment.name / name.lower().replace(" ", "-")),
        flops=experiment.flops,
        seq_len=experiment.seq_len,
        batch_size=experiment.batch_size,
        eval_windows=experiment.eval_windows,
        seed=seed,
        optim=OptimConfig(lr=experiment.lr[name]),
    )
    steps = experiment.flops / step_flops(_with_vocabulary(config, corpus), 0)
    config = replace(config, eval_every=max(1, round(steps / EVALUATIONS)))
    result = train(config, corpus=corpus, console=console, label=f"{experiment.name}, {name:<9}")
    if not result.finished:
        raise KeyboardInterrupt
    metrics = RunFolder(Path(config.out)).read_metrics()
    return Trained(
        model=result.state.model.eval(),
        lr=config.optim.lr,
        tokens=result.state.tokens,
        flops=result.state.flops,
        wall_s=result.state.train_s,
        checkpoint=result.path,
        curve=[
            (m["flops"], m["validation_bits_per_byte"])
            for m in metrics
            if m.get("validation_bits_per_byte") is not None
        ],
    )


def _with_vocabulary(config: TrainConfig, corpus: Corpus) -> TrainConfig:
    return replace(config, model=config.model.replace(vocab_size=corpus.tokenizer.vocab_size))
