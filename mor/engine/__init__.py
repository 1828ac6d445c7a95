"""Continuous depth-wise batching of many requests over a paged, recursion-wise KV cache."""

from mor.engine.engine import Engine, EngineConfig
from mor.engine.request import Request, RequestOutput, Status
from mor.generation import SamplingParams

__all__ = ["Engine", "EngineConfig", "Request", "RequestOutput", "SamplingParams", "Status"]
