"""The model's settings for transformers."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from mor.model.config import TRANSFORMERS_NAMES, ModelConfig, preset

_SETTINGS = tuple(ModelConfig.__dataclass_fields__)


class MoRConfig(PreTrainedConfig):
    """A :class:`ModelConfig` for transformers: the same settings as attributes, and those of
    transformers.

    Raises ValueError for a value that ModelConfig refuses and for a misspelt setting.
    """

    model_type = "mor"
    keys_to_ignore_at_inference = ["cache", "depths", "aux_loss"]  # noqa: RUF012 (a list to transformers)
    attribute_map = TRANSFORMERS_NAMES

    def __init__(self, **settings: Any) -> None:
        ours, settings = ModelConfig.among(settings)
        for name, value in ours.to_dict().items():
            setattr(self, name, value)
        super().__init__(**settings)

    @property
    def num_layers(self) -> int:
        """Layers that a token passes when it takes every recursion."""
        return self.to_model_config().num_layers

    def to_model_config(self) -> ModelConfig:
        return ModelConfig.from_dict({name: getattr(self, name) for name in _SETTINGS})

    def to_dict(self) -> dict[str, Any]:
        """tie_word_embeddings is there by its own name, too, where PEFT and others look for it."""
        found: dict[str, Any] = super().to_dict()
        return found | {"tie_word_embeddings": self.tie_embeddings}

    @classmethod
    def from_model_config(cls, config: ModelConfig, **settings: Any) -> MoRConfig:
        """settings: those of transformers, such as eos_token_id."""
        return cls(**config.to_dict(), **settings)

    @classmethod
    def from_preset(cls, name: str, **choices: Any) -> MoRConfig:
        """Arguments of :func:`mor.model.config.preset`."""
        return cls.from_model_config(preset(name, **choices))
