"""Paged attention in C for CPUs, compiled on first use with the machine's own compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC")


class CompilerError(Exception):
    """There is no C compiler, or it failed."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mor"


def compile_library(source: str) -> Path:
    """The shared library of ``source``, made unless an earlier run left it. Raises
    CompilerError."""
    compiler = (
        os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    )
    if compiler is None:
        raise CompilerError("no C compiler (cc, gcc or clang) was found")
    key = "\n".join(
        [source, compiler, *FLAGS, platform.node(), platform.processor(), torch.__version__]
    )
    library = cache_folder() / f"paged_attention-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        code, made = Path(folder, "source.c"), Path(folder, "made.so")
        code.write_text(source)
        done = subprocess.run(
            [compiler, *FLAGS, str(code), "-o", str(made), "-lm"], capture_output=True, text=True
        )
        if done.returncode:
            raise CompilerError(f"{compiler} failed:\n{done.stderr.strip()}")
        os.replace(made, library)
    return library


@functools.cache
def _function() -> Callable[..., None]:
    source = resources.files("mor.engine").joinpath("paged_attention.c").read_text()
    # PyTorch has loaded an OpenMP runtime of the same name, so both share one pool of threads.
    function = ctypes.CDLL(str(compile_library(source))).paged_attention
    function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 6 + [ctypes.c_int]
    function.restype = None
    return function


def compiled_attention(
    q_MNH: Tensor,
    k_EGH: Tensor,
    v_EGH: Tensor,
    table_RL: Tensor,
    row_M: Tensor,
    seen_M: Tensor,
    *,
    longest: int,
) -> Tensor:
    """As :func:`mor.engine.attention.gathered_attention`, for fp32 on the CPU, without copying
    entries."""
    q_MNH = q_MNH.contiguous()
    M, N, H = q_MNH.shape
    out_MNH, work = torch.empty_like(q_MNH), q_MNH.new_empty(M * N * longest)
    tensors = (q_MNH, k_EGH, v_EGH, table_RL, row_M, seen_M, out_MNH, work)
    assert all(t.is_contiguous() for t in tensors)
    sizes = (M, N, k_EGH.shape[1], H, table_RL.shape[1], longest)
    _function()(*(t.data_ptr() for t in tensors), *sizes, torch.get_num_threads())
    return out_MNH


def prepare() -> None:
    """Compile and load. Raises CompilerError."""
    _function()
