"""Paged attention in C for CPUs, compiled on first use with the machine's own compiler.

The C file needs no header of Python or PyTorch, so compiling it takes a fraction of a second, once
in each process: nothing is kept that could be damaged, or made for another machine. An extension
made with ``torch.utils.cpp_extension`` would compile PyTorch's headers and need Ninja.

E entries of a pool · G key/value heads · H head dim · L width of the table · M queries · N heads ·
R rows of the table
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

COMPILE = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
# Without -ffast-math: linked with it, a library makes the whole process take tiny numbers for zero.
LINK = ("-shared", "-fopenmp")
LONGEST_S = 20.0
"""Seconds that a compiler may take."""


class CompilerError(Exception):
    """There is no C compiler, or what it made does not work."""


def _compiler() -> list[str]:
    """The command of the C compiler, which CC may choose. Raises CompilerError."""
    found = filter(None, map(shutil.which, ("cc", "gcc", "clang")))
    try:
        command = shlex.split(os.environ.get("CC", "")) or list(found)[:1]
    except ValueError as error:
        raise CompilerError(f"CC={os.environ['CC']!r} is not a command: {error}") from error
    if not command:
        raise CompilerError("no C compiler (cc, gcc or clang) was found")
    return command


def compile_library(source: str, folder: Path) -> Path:
    """The library of ``source``, made in ``folder``. Raises CompilerError."""
    code, compiled, library = (folder / name for name in ("source.c", "source.o", "library.so"))
    code.write_text(source)
    _run([*COMPILE, str(code)], compiled)
    _run([*LINK, str(compiled), "-lm"], library)
    return library


def _run(arguments: list[str], made: Path) -> None:
    compiler, log = _compiler(), made.with_suffix(".txt")
    try:
        # Not through a pipe: that waits for processes that a compiler leaves behind.
        with log.open("w") as said:
            done = subprocess.run(
                [*compiler, *arguments, "-o", str(made)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                timeout=LONGEST_S,
            )
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f"{compiler[0]} took longer than {LONGEST_S:g} s") from error
    except OSError as error:
        raise CompilerError(f"{compiler[0]} does not run: {error}") from error
    if done.returncode or not made.is_file():
        said_last = log.read_text(errors="replace").strip() or f"exit status {done.returncode}"
        raise CompilerError(f"{compiler[0]} failed: {said_last}")


def _load(source: str) -> Callable[..., None]:
    """Compile and load. Raises CompilerError."""
    try:
        with tempfile.TemporaryDirectory(prefix="mor-") as folder:
            library = compile_library(source, Path(folder))
            # PyTorch has loaded an OpenMP runtime of the same name, so both share one pool of
            # threads. What is loaded stays when its file goes.
            function = ctypes.CDLL(str(library)).paged_attention
    except (OSError, AttributeError) as error:
        raise CompilerError(f"the compiled library cannot be loaded: {error}") from error
    function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 6 + [ctypes.c_int]
    function.restype = None
    return function


@functools.cache
def _loaded() -> Callable[..., None] | CompilerError:
    """The function, or why there is none: a compiler that fails is asked once."""
    try:
        return _load(resources.files("mor.engine").joinpath("paged_attention.c").read_text())
    except CompilerError as error:
        return error


def prepare() -> Callable[..., None]:
    """The function, compiled and loaded. Raises CompilerError."""
    if isinstance(found := _loaded(), CompilerError):
        raise found
    return found


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
    prepare()(*(t.data_ptr() for t in tensors), *sizes, torch.get_num_threads())
    return out_MNH
