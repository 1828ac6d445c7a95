"""Paged attention in C for CPUs, compiled on first use with the machine's own compiler.

The C file needs no header of Python or PyTorch, so compiling it takes less than a second, once for
each machine. An extension made with ``torch.utils.cpp_extension`` would compile PyTorch's headers
and need Ninja.

E entries of a pool · G key/value heads · H head dim · L width of the table · M queries · N heads ·
R rows of the table
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from mor.files import cache_folder

FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC")


class CompilerError(Exception):
    """There is no C compiler, or what it made does not work."""


def _compiler() -> list[str]:
    """The command of the C compiler, which CC may choose. Raises CompilerError."""
    found = filter(None, map(shutil.which, ("cc", "gcc", "clang")))
    command = shlex.split(os.environ.get("CC") or next(found, ""))
    if not command:
        raise CompilerError("no C compiler (cc, gcc or clang) was found")
    return command


def compile_library(source: str) -> Path:
    """The library of ``source``, compiled unless an earlier run did so. Raises CompilerError."""
    compiler = _compiler()
    # The code is for one processor, and one home may serve several machines.
    machine = (platform.node(), platform.processor(), torch.__version__)
    key = "\n".join([source, *compiler, *FLAGS, *machine])
    folder = cache_folder()
    library = folder / f"paged_attention-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as workplace:
            made = _compile(compiler, source, Path(workplace))
            os.replace(made, library)  # another process never sees half a library
    return library


def _compile(compiler: list[str], source: str, folder: Path) -> Path:
    code, library = folder / "source.c", folder / "library.so"
    code.write_text(source)
    command = [*compiler, *FLAGS, str(code), "-o", str(library), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CompilerError(f"{compiler[0]} does not run: {error}") from error
    if done.returncode:
        raise CompilerError(f"{compiler[0]} failed:\n{done.stderr.strip()}")
    return library


@functools.cache
def _function() -> Callable[..., None]:
    source = resources.files("mor.engine").joinpath("paged_attention.c").read_text()
    library = compile_library(source)
    try:
        # PyTorch has loaded an OpenMP runtime of the same name, so both share one pool of threads.
        function = ctypes.CDLL(str(library)).paged_attention
    except OSError as error:
        raise CompilerError(f"{library} cannot be loaded: {error}") from error
    function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 6 + [ctypes.c_int]
    function.restype = None
    return function


def compiled_attention(
    q_MNH: Tensor,
    k_EGH: Tensor,
    v_EGH: Tensor,
    table_RL: Tensor,
    row: Tensor,
    seen: Tensor,
    *,
    longest: int,
) -> Tensor:
    """:func:`mor.engine.attention.gathered_attention` for fp32 on the CPU, without the copies."""
    q_MNH = q_MNH.contiguous()
    M, N, H = q_MNH.shape
    out_MNH, scores = torch.empty_like(q_MNH), q_MNH.new_empty(M * N * longest)
    tensors = (q_MNH, k_EGH, v_EGH, table_RL, row, seen, out_MNH, scores)
    assert all(t.is_contiguous() for t in tensors)
    sizes = (M, N, k_EGH.shape[1], H, table_RL.shape[1], longest)
    _function()(*(t.data_ptr() for t in tensors), *sizes, torch.get_num_threads())
    return out_MNH


def prepare() -> None:
    """Compile and load. Raises CompilerError."""
    _function()
