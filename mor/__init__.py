"""Mixture-of-Recursions language models in PyTorch.

The names below are the public interface; they load when they are first used, so ``import mor``
costs nothing. ``import mor.hub`` makes the models known to transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor.analysis.explain import explain
    from mor.checkpoint import load
    from mor.engine import Engine, EngineConfig
    from mor.evaluation.nll import evaluate
    from mor.generation import SamplingParams, generate
    from mor.model import Transformer
    from mor.model.config import ModelConfig, RouterConfig, preset
    from mor.structure import Structure

__version__ = "0.1.0"

_HOME = {
    "preset": "mor.model.config",
    "ModelConfig": "mor.model.config",
    "RouterConfig": "mor.model.config",
    "Transformer": "mor.model",
    "load": "mor.checkpoint",
    "generate": "mor.generation",
    "SamplingParams": "mor.generation",
    "Structure": "mor.structure",
    "Engine": "mor.engine",
    "EngineConfig": "mor.engine",
    "evaluate": "mor.evaluation.nll",
    "explain": "mor.analysis.explain",
}

__all__ = [
    "Engine",
    "EngineConfig",
    "ModelConfig",
    "RouterConfig",
    "SamplingParams",
    "Structure",
    "Transformer",
    "evaluate",
    "explain",
    "generate",
    "load",
    "preset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mor' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
