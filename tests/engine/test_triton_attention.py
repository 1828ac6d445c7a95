"""The Triton kernel against its definition: in Triton's interpreter here, on a GPU where there is
one."""

import os
import subprocess
import sys

import pytest

COMPARE = """
import sys
import torch
from mor.engine.attention import gathered_attention
from mor.engine.triton_attention import triton_attention

device = sys.argv[1]
for heads in ((4, 2, 6), (9, 3, 64), (2, 2, 20)):
    dtype = torch.float32
    N, G, H = heads
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, N), (200, G), (200, G))
    q, k, v = (
        torch.randn(n, g, H, generator=generator).to(device, dtype) * 3 for n, g in shapes
    )
    rows = [torch.randperm(200, generator=generator)[:150] for _ in range(5)]
    table = torch.stack(rows).int().to(device)
    row = torch.tensor([0, 4, 2, 2, 1, 3, 0]).int().to(device)
    seen = torch.tensor([1, 150, 64, 65, 2, 128, 33]).int().to(device)
    args = (q, k, v, table, row, seen)
    expected = gathered_attention(*args, longest=150)
    torch.testing.assert_close(triton_attention(*args, longest=150), expected, rtol=1e-4, atol=1e-5)
print("equal")
"""


def compare(device, **environment):
    command = [sys.executable, "-c", COMPARE, device]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


def test_in_the_interpreter():
    pytest.importorskip(
        "triton",
        minversion="3.9",
        reason="no Triton, or one whose interpreter fails with NumPy 2.4",
    )
    compare("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_a_gpu():
    compare("cuda")
