"""The Triton kernel against its definition: in Triton's interpreter here, on a GPU where there is
one."""

import os
import subprocess
import sys

import pytest
import torch

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


@pytest.mark.gpu
@pytest.mark.parametrize("router", ["fixed", "expert_choice", "token_choice", "random"])
@pytest.mark.parametrize("kv_strategy", ["recursion_wise", "shared", "hybrid"])
def test_cuda_graphs_decode_as_the_plain_decoder(router, kv_strategy):
    from conftest import tiny

    from mor.engine import Engine, EngineConfig, SamplingParams
    from mor.engine.device_loop import DeviceLoop
    from mor.generation import generate

    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny(router, kv_strategy=kv_strategy, dim=64, head_dim=16).cuda()
    prompts = [[i + 1, i + 2, i + 3] for i in range(12)]
    params = SamplingParams(max_new_tokens=12, temperature=0)
    engine = Engine(model, config=EngineConfig(max_num_seqs=8, lanes=4))
    assert isinstance(engine.strategy, DeviceLoop)
    got, want = engine.generate(prompts, params), generate(model, prompts, params)
    assert engine.strategy.steps.graphs
    assert [r.token_ids for r in got] == [w.token_ids for w in want]
    assert [r.depths for r in got] == [w.depths for w in want]
