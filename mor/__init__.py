"""Mixture-of-Recursions language models: train, evaluate, explain, generate."""

__version__ = "0.1.0"
