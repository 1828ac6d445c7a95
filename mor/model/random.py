"""Random numbers without state: the same seed and counters give the same number anywhere.

The random router and the sampler use them, so that neither a batch's composition nor the way a
sequence is cut into prefill and decoding steps changes what a token draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The constants of splitmix64, as signed integers.
_GOLDEN = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts int64 with its sign


def hash_uniform(seed: int | Tensor, *counters: int | Tensor) -> Tensor:
    """Uniform float64 in [0, 1), one for each broadcast element of the int64 counters."""
    device = next(
        (c.device for c in (seed, *counters) if isinstance(c, Tensor)), torch.device("cpu")
    )
    state = torch.zeros((), dtype=torch.int64, device=device)
    for value in (seed, *counters):
        # Filled on the device: a copy from the host cannot be in a CUDA graph.
        if not isinstance(value, Tensor):
            value = torch.full((), value, dtype=torch.int64, device=device)
        state = (state ^ value) + _GOLDEN
        state = (state ^ _shift_right(state, 30)) * _MIX_1
        state = (state ^ _shift_right(state, 27)) * _MIX_2
        state = state ^ _shift_right(state, 31)
    return _shift_right(state, 11).double() * 2.0**-53
