"""The Triton kernels against their definition: in Triton's interpreter here, on a GPU where there
is one; and compiled for GPUs that are not here."""

import importlib.util
import os
import subprocess
import sys

import pytest

COMPARE = """
import sys
import torch
from mor.engine import triton_attention as kernels
from mor.engine.attention import gathered_attention

device = sys.argv[1]
if device == "cpu":  # the interpreter's product takes the bits of bfloat16 for integers
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    product = InterpreterBuilder.create_dot

    def of_numbers(self, a, b, *others):
        wide = [
            self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        ]
        return product(self, *wide, *others)

    InterpreterBuilder.create_dot = of_numbers

ENTRIES = 5000
# Heads, key/value heads, dimensions of a head; how many entries each query sees.
SHORT, LONG = (1, 150, 64, 65, 2, 128, 33), (1, 4096, 257)
CASES = [
    ((4, 2, 6), SHORT), ((9, 3, 64), SHORT), ((2, 2, 20), SHORT), ((15, 5, 64), SHORT),
    ((4, 2, 6), LONG), ((9, 3, 64), LONG),
]
found = set()
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for (N, G, H), seen in CASES:
        generator = torch.Generator().manual_seed(0)
        longest, M = max(seen), len(seen)
        shapes = ((M, N + 1), (ENTRIES, G), (ENTRIES, G))
        q, k, v = (
            torch.randn(n, g, H, generator=generator).to(device, dtype) * 2 for n, g in shapes
        )
        q = q[:, :N]  # as it comes from fused projections
        rows = [torch.randperm(ENTRIES, generator=generator)[:longest] for _ in range(5)]
        table = torch.stack(rows).int().to(device)
        row = torch.tensor([0, 4, 2, 2, 1, 3, 0][:M]).int().to(device)
        args = (q, k, v, table, row, torch.tensor(seen).int().to(device))
        exact = (q.double(), k.double(), v.double(), *args[3:])
        expected = gathered_attention(*exact, longest=longest).float()
        got = kernels.triton_attention(*args, longest=longest)
        assert got.dtype == dtype and got.is_contiguous()
        torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)
        found.add(kernels.num_parts(M * G, longest, kernels._processors(q.device)))
assert 1 in found and max(found) > 8, found
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


def test_contexts_are_split_where_the_queries_leave_processors_idle():
    kernels = pytest.importorskip("mor.engine.triton_attention", exc_type=ImportError)
    parts = kernels.num_parts
    assert parts(32 * 5, longest=100_000, processors=132) == 1  # all are busy already
    assert parts(8 * 5, longest=511, processors=132) == 1  # short
    assert parts(8 * 5, longest=512, processors=132) == 2
    assert parts(8 * 5, longest=2048, processors=132) == 7  # 280 programs for 132 processors
    assert parts(1 * 5, longest=2048, processors=132) == 8  # 256 entries in each
    assert parts(1 * 5, longest=100_000, processors=132) == 53


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_for_gpus_that_are_not_here(capability, dtype):
    """Triton brings the assembler along."""
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") or not importlib.util.find_spec("triton.backends.nvidia"):
        pytest.skip("this Triton compiles nothing for NVIDIA's GPUs")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mor.engine import triton_attention as kernels

    sizes = {"DIM": 64, "DIM_PADDED": 64}
    common = dict(HEADS=15, GROUPS=5, HEADS_PADDED=16, ENTRIES=kernels.ENTRIES) | sizes
    for kernel, constants in [
        (kernels._attend, common | {"PARTS": 1}),
        (kernels._attend, common | {"PARTS": 8}),
        (kernels._combine, sizes | {"PARTS": 53, "PARTS_PADDED": 64}),
    ]:
        part = "fp32" if constants["PARTS"] > 1 else dtype
        types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}")
        types |= dict.fromkeys(("table_ptr", "row_ptr", "seen_ptr"), "*i32")
        types |= dict.fromkeys(("top_ptr", "total_ptr", "result_ptr"), "*fp32")
        types |= {"out_ptr": f"*{dtype if kernel is kernels._combine else part}"}
        types |= {"scale": "fp32", "table_width": "i32", "query_stride": "i32"}
        signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"]
