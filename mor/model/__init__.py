"""The model: exactly what an export with remote code ships. Imports nothing of mor but the ground
(settings). The names below load when they are first used, so that settings come without torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor.model.transformer import Output, Transformer

__all__ = ["Output", "Transformer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mor.model' has no attribute {name!r}")
    from mor.model import transformer

    return getattr(transformer, name)
