"""The compiled attention equals its definition, and a compiler may fail in any way."""

import shutil

import pytest
import torch

from mor.engine import cpu_attention
from mor.engine.attention import gathered_attention


@pytest.mark.parametrize("heads", [(4, 2, 6), (9, 3, 64), (2, 2, 5)])
def test_compiled_attention(heads):
    from mor.engine.cpu_attention import CompilerError, compiled_attention, prepare

    try:
        prepare()
    except CompilerError as error:
        pytest.skip(str(error))
    N, G, H = heads
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(n, g, H, generator=generator) * 3 for n, g in ((7, N), (100, G), (100, G))
    )
    table = torch.stack([torch.randperm(100, generator=generator)[:50] for _ in range(5)]).int()
    row, seen = (
        torch.tensor([0, 4, 2, 2, 1, 3, 0]).int(),
        torch.tensor([1, 50, 17, 32, 2, 40, 33]).int(),
    )
    args = (q, k, v, table, row, seen)
    torch.testing.assert_close(
        compiled_attention(*args, longest=50), gathered_attention(*args, longest=50)
    )


@pytest.mark.parametrize(
    ("compiler", "source", "words"),
    [
        ("/nonexistent/cc", "int x;", "does not run"),
        ('cc "', "int x;", "is not a command"),
        ("false", "int x;", "failed"),
        ("true", "int x;", "failed"),
        ("sh -c 'exec sleep 60'", "int x;", "took longer than 0.1 s"),
        ("cc", "no C", "failed"),
        ("cc", "int x;", "cannot be loaded"),
    ],
)
def test_a_compiler_that_does_not_work_is_a_compiler_error(monkeypatch, compiler, source, words):
    if compiler == "cc" and shutil.which("cc") is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(cpu_attention, "LONGEST_S", 0.1 if "sleep" in compiler else 20)
    with pytest.raises(cpu_attention.CompilerError, match=words):
        cpu_attention._load(source)


def test_without_a_place_for_files_there_is_a_compiler_error(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    with pytest.raises(cpu_attention.CompilerError, match="/nonexistent"):
        cpu_attention._load("int x;")


def test_the_library_leaves_tiny_numbers_of_the_process_as_they_are():
    try:
        cpu_attention.prepare()
    except cpu_attention.CompilerError as error:
        pytest.skip(str(error))
    assert float(torch.tensor([1e-40], dtype=torch.float64).float() * 2) > 0
