"""Prompts are read in chunks of any size."""

import pytest

from mor.engine import Engine, EngineConfig
from mor.generation import generate
from tests.conftest import tiny
from tests.engine.requests import draw_requests, same


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 11, 64])
def test_odd_prefill_chunks(chunk):
    model = tiny(kv_strategy="hybrid")
    prompts, params = draw_requests(7, seed=4, longest_prompt=40)
    engine = Engine(model, config=EngineConfig(prefill_chunk=chunk))
    same(engine.generate(prompts, params), generate(model, prompts, params))
