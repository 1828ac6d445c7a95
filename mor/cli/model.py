"""mor costs, and the choice of a model that several commands share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import arg

from mor.cli.show import print_rows
from mor.model.config import KVStrategyName, ModelConfig, Recipe, RouterKind, Sharing, preset


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model: a preset and the paper's layout for a number of recursions."""

    preset: str = "mini"
    """tiny, mini, small, smollm-135m, smollm-360m, smollm-730m or smollm-1.7b."""
    num_recursions: int = 3
    """Times the shared layers are applied; 1 is a vanilla Transformer."""
    router: RouterKind | None = None
    """Default: expert_choice with several recursions, fixed with one."""
    sharing: Sharing = "middle_cycle"
    recipe: Recipe = "recommended"
    """Router, gate, keys and values where they are not given. recommended: expert-choice, residual
    gate with alpha 1, hybrid; paper: expert-choice, the paper's gate with alpha 0.1,
    recursion_wise."""
    kv_strategy: KVStrategyName | None = None
    """Default: the recipe's."""
    num_layers: int | None = None
    """Effective depth. Default: the preset's, rounded up to one that the sharing scheme allows."""

    def build(self) -> ModelConfig:
        return preset(
            self.preset,
            num_recursions=self.num_recursions,
            sharing=self.sharing,
            num_layers=self.num_layers,
            recipe=self.recipe,
            router=self.router,
            kv_strategy=self.kv_strategy,
        )


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """A step whose memory on one rank is estimated; sequences have the length --context."""

    batch_size: int | None = None
    """Sequences per forward and rank."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: bool = False
    ranks: int = 1
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


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Parameters, FLOPs and KV bytes of a model, before training it; with --train.batch-size what a
    GPU must hold."""

    choice: Annotated[ModelChoice, arg(name="")] = field(
        default_factory=lambda: ModelChoice(preset="smollm-360m")
    )
    context: int | None = None
    """Sequence length; the preset's maximum if not given."""
    kv_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    train: TrainingStep = field(default_factory=TrainingStep)
    json: bool = False

    def run(self, console: Console) -> None:
        from mor.costs.flops import costs

        config, dtype_bytes = self.choice.build(), 4 if self.kv_dtype == "float32" else 2
        found = asdict(costs(config, context=self.context, kv_dtype_bytes=dtype_bytes))
        chosen = {
            "recipe": self.choice.recipe,
            "router": config.router.kind,
            "kv_strategy": config.kv_strategy,
        }
        row = chosen | found | self.train.memory(config, found["context"])
        print_rows([row], self.json, console, title=self.choice.preset)
