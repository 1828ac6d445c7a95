"""``torch.compile``, the same everywhere: whole graphs, for any number of models in a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MOST_GRAPHS = 128
"""Of one function in a process: a few for each shape of model, dtype and mode."""


def compiled(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """``function`` as one graph; what breaks it is an error. settings: as ``torch.compile`` takes
    them."""
    # PyTorch counts the graphs of all models together, and past its limit of 8 it would fail.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    return torch.compile(function, fullgraph=True, **settings)


def failed_to_compile(error: BaseException) -> bool:
    """Whether this comes from PyTorch's compiler or what it calls, such as a C compiler or Triton,
    and not from what was compiled."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton"))


def what_failed(error: BaseException) -> str:
    """Its kind and how its message begins, in one line."""
    said = " ".join(str(error).split("\n\n")[0].split())[:400]
    return f"{type(error).__name__}: {said}"
