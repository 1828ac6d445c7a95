"""The choice of a model that several commands share."""

from __future__ import annotations

from mor.model.config import KVStrategyName, ModelConfig, RouterKind, Sharing, preset
from mor.settings import PositiveInt, Settings


class ModelChoice(Settings):
    """Which model: a preset and the paper's layout for a number of recursions."""

    preset: str = "mini"
    """tiny, mini, small, smollm-135m, smollm-360m, smollm-730m or smollm-1.7b; mor presets shows
    their sizes."""
    num_recursions: PositiveInt = 3
    """Times the shared layers are applied; 1 is a vanilla Transformer."""
    router: RouterKind | None = None
    """Default: expert_choice with several recursions, fixed with one."""
    sharing: Sharing = "middle_cycle"
    kv_strategy: KVStrategyName = "recursion_wise"
    """Keys and values that a pass reads: its own, the first pass's, or both together."""
    num_layers: PositiveInt | None = None
    """Effective depth. Default: the preset's, rounded up to one that the sharing scheme allows."""

    def build(self) -> ModelConfig:
        return preset(
            self.preset,
            num_recursions=self.num_recursions,
            sharing=self.sharing,
            num_layers=self.num_layers,
            router=self.router or ("expert_choice" if self.num_recursions > 1 else "fixed"),
            kv_strategy=self.kv_strategy,
        )
