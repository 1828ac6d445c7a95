"""The model: exactly what an export with remote code ships. Imports nothing of mor but the ground
(settings)."""

from mor.model.transformer import Output, Transformer

__all__ = ["Output", "Transformer"]
