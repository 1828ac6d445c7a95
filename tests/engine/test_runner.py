"""Depths are capped while decoding."""

import pytest

from mor.engine import Engine, EngineConfig
from mor.generation import generate
from tests.conftest import tiny
from tests.engine.requests import KV, draw_requests, same


@pytest.mark.parametrize("max_depth", [1, 2])
@pytest.mark.parametrize(
    "router", ["fixed", "expert_choice", "token_choice", "random", "position", "frequency"]
)
def test_capped_depth(router, max_depth):
    model = tiny(router, kv_strategy=KV[len(router) % 4])
    prompts, params = draw_requests(5)
    engine = Engine(model, config=EngineConfig(max_depth=max_depth))
    same(engine.generate(prompts, params), generate(model, prompts, params, max_depth=max_depth))
    with pytest.raises(ValueError, match="max_depth"):
        Engine(model, config=EngineConfig(max_depth=4))
