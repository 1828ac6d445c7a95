"""The choice of a model that several commands share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import get_args

from mor.model.config import (
    KVStrategyName,
    ModelConfig,
    NoEffect,
    Recipe,
    RouterKind,
    Sharing,
    preset,
)
from mor.settings import PositiveInt, Settings


class ModelChoice(Settings):
    """Which model: a preset and the paper's layout for a number of recursions."""

    preset: str = "mini"
    """tiny, mini, small, smollm-135m, smollm-360m, smollm-730m or smollm-1.7b (see mor presets)."""
    num_recursions: PositiveInt = 3
    """How often the shared layers are applied; 1 is a vanilla Transformer."""
    recipe: Recipe = "recommended"
    """Router, gate, keys and values where they are not given. recommended: expert-choice, residual
    gate with alpha 1, hybrid; elastic, for many depths of inference: final, the gain of going on
    decides, and mor train teaches it in steps of full depth with exits; paper: expert-choice, the
    paper's gate with alpha 0.1, recursion_wise."""
    router: RouterKind | None = None
    """Default: expert_choice with several recursions, fixed with one."""
    sharing: Sharing = "middle_cycle"
    kv_strategy: KVStrategyName | None = None
    """Keys and values that a pass reads: its own (recursion_wise), the first pass's (shared), or
    both together (hybrid). Default: the recipe's."""
    num_layers: PositiveInt | None = None
    """Effective depth. Default: the preset's, rounded up to one that the sharing scheme allows."""

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Names of these flags that change nothing of the model, and why."""
        model = self.build()
        yield from model.without_effect()
        for name, choices in (("recipe", Recipe), ("sharing", Sharing)):
            others = (replace(self, **{name: other}) for other in get_args(choices))
            with suppress(ValueError):  # of a depth that fits this one only
                if all(other.build() == model for other in others):
                    yield name, f"on {model.layout_name} with router={model.router.kind!r}"

    def build(self) -> ModelConfig:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffect)  # without_effect knows what was given
            return preset(
                self.preset,
                num_recursions=self.num_recursions,
                sharing=self.sharing,
                num_layers=self.num_layers,
                recipe=self.recipe,
                router=self.router,
                kv_strategy=self.kv_strategy,
            )
