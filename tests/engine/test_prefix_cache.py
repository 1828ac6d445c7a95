"""Prompts that begin alike are read once."""

import pytest

from mor.engine import Engine, EngineConfig, SamplingParams
from mor.engine.prefix_cache import PrefixCache, Segment
from mor.generation import generate
from tests.conftest import cases, random_tokens, some, tiny
from tests.engine.requests import POISON, all_memory_is_back, poisoned, same


@pytest.mark.parametrize("make_model", some(cases("singles", with_final=True), 2))
def test_prefix_cache_hits(make_model):
    model = make_model()
    shared = random_tokens(17, seed=5).tolist()
    prompts = [shared[:n] + random_tokens(3, seed=n).tolist() for n in (17, 17, 12, 5, 16)]
    want = generate(model, prompts, SamplingParams(max_new_tokens=5, temperature=0))
    engine = Engine(model, config=EngineConfig(page_size=4, prefill_chunk=7))
    # one after another, so that each can hit
    for prompt, generation in zip(prompts, want, strict=True):
        same(
            engine.generate([prompt], SamplingParams(max_new_tokens=5, temperature=0)), [generation]
        )
    assert engine.prefix_cache.hits >= 3
    same(engine.generate(prompts, SamplingParams(max_new_tokens=5, temperature=0)), want)
    all_memory_is_back(engine)


def test_prefix_hits_are_not_read_again():
    model, prompt = tiny(), random_tokens(20).tolist()
    engine = Engine(model, config=EngineConfig(page_size=4))
    params = SamplingParams(max_new_tokens=2, temperature=0)
    engine.generate([prompt], params)
    read = engine.measured.tokens["read"]
    (again,) = engine.generate([prompt], params)
    # the last one is decoded
    assert read == 19 and again.num_cached == 16 and engine.measured.tokens["read"] == 22


def test_what_a_preempted_request_has_written_is_no_cached_prompt():
    engine = Engine(tiny(), config=EngineConfig(page_size=2))
    request = engine.add_request([1, 2, 3], SamplingParams(max_new_tokens=16, temperature=0))
    for _ in range(2):  # the second time, what was read again is cached
        written = len(request.token_ids)
        while len(request.token_ids) < written + 5:
            engine.step()
        engine.scheduler._preempt(request)
    engine.step()
    assert request.depths and engine.prefix_cache.hits and request.num_cached == 0


def test_prefix_cache_forgets_the_end_of_a_chain_first():
    cache = PrefixCache(2)
    parts = [Segment([], [], None) for _ in range(3)]
    cache.add([1, 2, 3, 4], parts.__getitem__)
    cache.add([9, 9], lambda index: parts[2])
    assert cache.match([1, 2, 3, 4, 5]) == parts[:2] and cache.match([1, 2, 3, 4]) == parts[:1]
    assert cache.match([9, 9, 1]) == [parts[2]]
    assert cache.evict() is parts[1]
    assert cache.evict() is parts[0]
    assert cache.match([1, 2, 3, 4, 5]) == []


@pytest.mark.parametrize("attention", ["auto", "gathered"])
def test_what_was_read_beside_a_token_that_is_not_finite_is_not_cached(attention):
    """Under a mask nan times zero is nan, so even tokens before it are spoilt."""
    model = poisoned()
    beginning, params = random_tokens(8, vocab=36).tolist(), SamplingParams(max_new_tokens=3)
    engine = Engine(model, config=EngineConfig(page_size=2, attention=attention))
    prompts = [[*beginning, POISON, 5], [*beginning, 4, 5]]
    bad, good = (engine.generate([prompt], params)[0] for prompt in prompts)
    assert bad.finish_reason == "error" and "not finite" in bad.error and not bad.token_ids
    assert good.num_cached == 0
    same([good], generate(model, prompts[1:], params))
    all_memory_is_back(engine)
