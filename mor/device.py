"""Which device to use, and which of its attention kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

PREFERENCE = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU. A GPU named by its number becomes the
    current one, since Triton's kernels and CUDA graphs run on that.

    Raises ValueError for a device that PyTorch does not know or that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device={name!r} cannot be used here ({reason}); try 'cpu'") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


@contextmanager
def preferred_kernels(device: torch.device) -> Iterator[None]:
    """Prefer cuDNN's attention on Hopper and later GPUs, the others wherever it declines."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        yield
        return
    with sdpa_kernel(PREFERENCE, set_priority=True):
        yield
