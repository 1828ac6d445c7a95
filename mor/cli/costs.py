"""mor costs"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console
from tyro.conf import arg

from mor.cli.choice import ModelChoice
from mor.cli.command import Command
from mor.cli.show import print_rows
from mor.model.config import ModelConfig
from mor.settings import PositiveInt, Settings

if TYPE_CHECKING:
    from mor.training.config import TrainConfig


class TrainingStep(Settings):
    """A step whose memory on one rank is estimated; sequences have the length --context."""

    batch_size: PositiveInt | None = None
    """Sequences per forward and rank."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: bool = False
    ranks: PositiveInt = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"

    def memory(self, config: ModelConfig, seq_len: int) -> dict[str, float]:
        """Gigabytes by what they hold; nothing without a batch size."""
        from mor.costs.memory import Step, train_memory

        if self.batch_size is None:
            return {}
        settings: dict[str, Any] = asdict(self) | {"seq_len": seq_len}
        return {
            f"train_{name}_gb": n / 1e9
            for name, n in asdict(train_memory(config, Step(**settings))).items()
        }


class Costs(Command):
    """Parameters, FLOPs and KV bytes of a model, before training it or of a checkpoint; with
    --train.batch-size what a GPU must hold.

    The vocabulary counted is the preset's; `mor train` takes that of its tokenizer. With --recipe
    elastic, FLOPs are the mean of its steps, and memory is that of its steps of full depth without
    their exits; those of a run's checkpoint are the run's.
    """

    choice: Annotated[ModelChoice, arg(name="")] = field(
        default_factory=lambda: ModelChoice(preset="smollm-360m")
    )
    checkpoint: Path | None = None
    """A run folder or a checkpoint, in place of a preset."""
    context: PositiveInt | None = None
    """Sequence length; the model's maximum if not given."""
    kv_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    train: TrainingStep = field(default_factory=TrainingStep)
    json: bool = False

    def without_effect(self) -> Iterator[tuple[str, str]]:
        if self.checkpoint is not None:
            yield " ".join(asdict(self.choice)), "with --checkpoint, which has its own shape"
        else:
            yield from self.choice.without_effect()
        if self.train.batch_size is None:
            names = ("precision", "recompute", "ranks", "parallel")
            yield " ".join(f"train.{name}" for name in names), "without --train.batch-size"

    def run(self, console: Console) -> None:
        from mor.costs.flops import costs
        from mor.training.config import mean_flops_per_token

        config, dtype_bytes = self._model(), 4 if self.kv_dtype == "float32" else 2
        found = asdict(costs(config, context=self.context, kv_dtype_bytes=dtype_bytes))
        recipe = {"recipe": self.choice.recipe} if self.checkpoint is None else {}
        chosen = {
            **recipe,
            "router": config.router.kind,
            "kv_strategy": config.kv_strategy,
            "vocab_size": config.vocab_size,
        }
        held = config
        if steps := self._steps(config, found["context"]):
            found["train_flops_per_token"] = mean_flops_per_token(steps)
            if steps.full_depth_share:
                everyone = (1.0,) * config.num_recursions
                held = config.replace(router=replace(config.router, capacities=everyone))
        row = chosen | found | self.train.memory(held, found["context"])
        title = self.choice.preset if self.checkpoint is None else str(self.checkpoint)
        print_rows([row], self.json, console, title=title)

    def _model(self) -> ModelConfig:
        if self.checkpoint is None:
            return self.choice.build()
        from mor import checkpoint

        return checkpoint.read_config(checkpoint.resolve(self.checkpoint))

    def _steps(self, config: ModelConfig, length: int) -> TrainConfig | None:
        """Training steps that are not of the model alone: a recipe's, or those of the run."""
        from mor.training.config import TrainConfig, settings_of, training_of

        shape: dict[str, Any] = {"model": config.replace(max_seq_len=length), "seq_len": length}
        if self.checkpoint is not None:
            if (made := settings_of(self.checkpoint)) is not None:
                return replace(made, **shape)
            # A deepened one is trained in its new parts, and measures gains.
            return TrainConfig.from_dict(shape) if config.deepened else None
        if beside := training_of(self.choice.recipe, config):
            # of four sequences, exits are a whole number
            return TrainConfig.from_dict(shape | {"batch_size": 4} | beside)
        return None
