"""Which attention an engine takes."""

import pytest

from mor.engine import Engine, EngineConfig
from mor.engine.attention import gathered_attention
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
