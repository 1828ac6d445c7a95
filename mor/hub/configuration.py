"""The model's settings for transformers."""

from __future__ import annotations

import difflib
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from mor.model.config import ModelConfig, preset

_SETTINGS = tuple(ModelConfig.__dataclass_fields__)


class MoRConfig(PreTrainedConfig):
    """A :class:`ModelConfig` for transformers: the same settings as attributes, and those of
    transformers.

    Raises ValueError for a value that ModelConfig refuses and for a misspelt setting.
    """

    model_type = "mor"
    keys_to_ignore_at_inference = ["cache", "depths", "aux_loss"]  # noqa: RUF012 (a list to transformers)
    attribute_map = {  # noqa: RUF012 (transformers reads it from the class)
        "hidden_size": "dim",
        "intermediate_size": "ffn_dim",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "norm_eps",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **settings: Any) -> None:
        for theirs, ours_ in self.attribute_map.items():
            if theirs in settings:
                value = settings.pop(theirs)
                if settings.setdefault(ours_, value) != value:
                    raise ValueError(
                        f"{theirs}={value!r} and {ours_}={settings[ours_]!r} are one setting with "
                        "two values; give one of them"
                    )
        ours = {name: settings.pop(name) for name in _SETTINGS if name in settings}
        for name in settings:
            if close := difflib.get_close_matches(name, _SETTINGS, n=1, cutoff=0.8):
                raise ValueError(f"MoRConfig has no setting {name!r} (did you mean {close[0]!r}?)")
        for name, value in ModelConfig.from_dict(ours).to_dict().items():
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
