"""Which attention an engine takes."""

import pytest
import torch

from mor.engine import Engine, EngineConfig
from mor.engine.attention import _LOAD, decode_attention, gathered_attention
from tests.conftest import tiny


def test_without_a_compiler_the_fallback_is_announced(monkeypatch):
    from mor.engine import cpu_attention

    def fails():
        raise cpu_attention.CompilerError("no C compiler (cc, gcc or clang) was found")

    monkeypatch.setattr(cpu_attention, "prepare", fails)
    with pytest.warns(UserWarning, match="slower: no C compiler"):
        assert Engine(tiny()).kv.decode_attention is gathered_attention
    with pytest.raises(ValueError, match="is not available"):
        Engine(tiny(), config=EngineConfig(attention="compiled"))
    with pytest.raises(ValueError, match="needs float32"):
        Engine(tiny().double(), config=EngineConfig(attention="compiled"))


def entries(number):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(number, 2, 6, generator=generator) for _ in range(2))


@pytest.mark.parametrize("backend", ["gathered", "auto"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_a_query_does_not_see_is_not_read(backend, value):
    attend = decode_attention(backend, torch.device("cpu"), torch.float32)
    (k, v), q = entries(9), torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    table = torch.tensor([[3, 1, 0, 7], [2, 5, 6, 8]], dtype=torch.int32)
    row, seen = torch.tensor([0, 1]).int(), torch.tensor([2, 4]).int()
    want = attend(q, k, v, table, row, seen, longest=4)
    k[[0, 7]] = v[[0, 7]] = value
    torch.testing.assert_close(attend(q, k, v, table, row, seen, longest=4), want)
    k[1] = v[1] = value
    found = attend(q, k, v, table, row, seen, longest=4)
    assert not found[0].isfinite().any() and torch.equal(found[1], want[1])


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_a_kernel_that_does_not_work_here_is_not_taken(monkeypatch, fault):
    def broken(q, *args, **settings):
        if fault == "raises":
            raise OSError("no such device")
        return torch.zeros_like(q)

    monkeypatch.setitem(_LOAD, "compiled", lambda: broken)
    words = {"raises": "no such device", "is wrong": "wrong results"}[fault]
    with pytest.warns(UserWarning, match=words) as shown:
        assert Engine(tiny()).kv.decode_attention is gathered_attention
    assert len(shown) == 1
    with pytest.raises(ValueError, match=words):
        Engine(tiny(), config=EngineConfig(attention="compiled"))
