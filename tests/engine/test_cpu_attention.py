"""The compiled attention equals its definition."""

import pytest
import torch

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


def test_a_compiler_that_does_not_run_is_a_compiler_error(monkeypatch, tmp_path):
    from mor.engine.cpu_attention import CompilerError, compile_library

    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.raises(CompilerError, match="does not run"):
        compile_library("int x;", tmp_path)
