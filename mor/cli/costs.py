"""mor costs"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, field, replace
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import arg

from mor.cli.choice import ModelChoice
from mor.cli.command import Command
from mor.cli.show import print_rows
from mor.model.config import ModelConfig
from mor.settings import PositiveInt, Settings


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
    """Parameters, FLOPs and KV bytes of a model, before training it; with --train.batch-size what a
    GPU must hold.

    The vocabulary counted is the preset's; `mor train` takes that of its tokenizer. With --recipe
    elastic, FLOPs are the mean of its steps, and memory is that of its steps of full depth without
    their exits.
    """

    choice: Annotated[ModelChoice, arg(name="")] = field(
        default_factory=lambda: ModelChoice(preset="smollm-360m")
    )
    context: PositiveInt | None = None
    """Sequence length; the preset's maximum if not given."""
    kv_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    train: TrainingStep = field(default_factory=TrainingStep)
    json: bool = False

    def without_effect(self) -> Iterator[tuple[str, str]]:
        yield from self.choice.without_effect()
        if self.train.batch_size is None:
            names = ("precision", "recompute", "ranks", "parallel")
            yield " ".join(f"train.{name}" for name in names), "without --train.batch-size"

    def run(self, console: Console) -> None:
        from mor.costs.flops import costs
        from mor.training.config import TrainConfig, mean_flops_per_token, training_of

        config, dtype_bytes = self.choice.build(), 4 if self.kv_dtype == "float32" else 2
        found = asdict(costs(config, context=self.context, kv_dtype_bytes=dtype_bytes))
        chosen = {
            "recipe": self.choice.recipe,
            "router": config.router.kind,
            "kv_strategy": config.kv_strategy,
            "vocab_size": config.vocab_size,
        }
        held = config
        if beside := training_of(self.choice.recipe, config):
            length = found["context"]
            model = config.replace(max_seq_len=length)
            # of four sequences, exits are a whole number
            shape = {"model": model, "seq_len": length, "batch_size": 4}
            steps = TrainConfig.from_dict(shape | beside)
            found["train_flops_per_token"] = mean_flops_per_token(steps)
            everyone = (1.0,) * config.num_recursions
            held = config.replace(router=replace(config.router, capacities=everyone))
        row = chosen | found | self.train.memory(held, found["context"])
        print_rows([row], self.json, console, title=self.choice.preset)
