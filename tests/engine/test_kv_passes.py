"""Prompts are read in chunks of any size."""

import pytest

from mor.engine import Engine, EngineConfig, SamplingParams
from mor.generation import generate
from tests.conftest import tiny
from tests.engine.requests import KV, POISON, draw_requests, poisoned, same


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 11, 64])
def test_odd_prefill_chunks(chunk):
    model = tiny(kv_strategy="hybrid")
    prompts, params = draw_requests(4, seed=4, longest_prompt=40)
    engine = Engine(model, config=EngineConfig(prefill_chunk=chunk))
    same(engine.generate(prompts, params), generate(model, prompts, params))


@pytest.mark.parametrize("kv_strategy", KV)
def test_prompts_read_beside_one_that_is_not_finite(kv_strategy):
    """Places that a row does not see may hold nan of others, and zero times nan is nan."""
    model = poisoned(kv_strategy=kv_strategy)
    prompts = [[POISON, *range(1, 12)], [5, 6, 7], [*range(1, 14)], [3, POISON, 1]]
    params = SamplingParams(max_new_tokens=5, temperature=0)
    engine = Engine(model, config=EngineConfig(page_size=4, prefix_caching=False))
    for _ in range(2):  # the second time on pages with nan in them
        got = engine.generate(prompts, params)
        assert [request.finish_reason for request in got] == ["error", "length", "length", "error"]
        same(got[1:3], generate(model, prompts[1:3], params))
