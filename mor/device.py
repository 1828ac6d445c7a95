"""Which device to use, how precisely it computes, how data get there, what it can do at most."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["auto", "float32", "tf32", "bfloat16"]
"""Of the products of matrices with float32 weights. auto: bfloat16 on CUDA, float32 elsewhere."""


def pick_device(name: str = "auto", precision: Precision = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU. A GPU named by its number becomes the
    current one, since Triton's kernels and CUDA graphs run on that.

    On CUDA this also says, for the whole process, what float32 means there: exact products, unless
    ``tf32`` is asked for, whose factors have 10 bits after the point.

    Raises ValueError for a device that PyTorch does not know or that this machine does not have,
    and for ``tf32`` without CUDA.
    """
    device = _find(name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    elif precision == "tf32":
        raise ValueError(f"precision='tf32' needs a CUDA device, not {device}; choose 'float32'")
    return device


def _find(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
        if device.type == "cpu" and device.index:  # PyTorch takes any number for its only CPU
            raise RuntimeError
    except (RuntimeError, AssertionError, NotImplementedError):
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(
            f"there is no device {name!r} for PyTorch {torch.__version__} on this machine; it has "
            f"{', '.join(here)}"
        ) from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def is_low(device: torch.device, precision: Precision) -> bool:
    """Whether products are made in bfloat16."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")


def autocast(device: torch.device, precision: Precision = "auto") -> AbstractContextManager[object]:
    """Around forwards: their products in this precision, losses and decisions in float32."""
    if is_low(device, precision):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device. From the host to CUDA it passes through pinned memory, so that
    the host goes on meanwhile."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


PEAK_FLOPS_PER_S = {
    "A100": 312e12,
    "A10G": 70e12,
    "A40": 150e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 products that a GPU does by its maker's data sheet, by part of its name."""


def peak_flops_per_s(device: torch.device) -> float | None:
    """What the device does at most in bfloat16, for the MFU; None if that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [part for part in PEAK_FLOPS_PER_S if part in name]
    return PEAK_FLOPS_PER_S[max(known, key=len)] if known else None
