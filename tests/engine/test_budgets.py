"""Requests with different depths in one engine."""

from dataclasses import replace

import pytest

from mor.engine import Engine, EngineConfig, SamplingParams
from mor.generation import generate
from tests.budgets import DEPTHS, calibrated
from tests.engine.requests import KV, all_memory_is_back, draw_requests, same, small_pool

LOOPS = [
    ("depth_wise", "host"),
    ("depth_wise", "device"),
    ("lock_step", "host"),
    ("static", "host"),
    ("auto", "host"),
]


def with_depths(params):
    return [replace(own, depth=DEPTHS[(i + 2) % len(DEPTHS)]) for i, own in enumerate(params)]


def combinations():
    for i, (batching, loop) in enumerate(LOOPS):
        for k, kv in enumerate(KV):
            for j, router in enumerate(("expert", "token", "fixed", "random")):
                quick = (i + k) % 3 == 0 and j == (i + k // 2) % 2
                if kv == "final":
                    quick = batching == "auto" and j == 0
                marks = () if quick else pytest.mark.slow
                yield pytest.param(batching, loop, kv, router, marks=marks)
    for batching, loop in (("depth_wise", "host"), ("depth_wise", "device"), ("lock_step", "host")):
        marks = pytest.mark.slow if batching == "lock_step" else ()
        yield pytest.param(batching, loop, "hybrid", "deepened", marks=marks)


@pytest.mark.parametrize(("batching", "loop", "kv", "router"), [*combinations()])
def test_requests_of_all_depths_are_served_as_the_plain_decoder_does(batching, loop, kv, router):
    """In a pool so small that some are preempted, twice, so that prompts come from the cache."""
    model = calibrated(router, kv)
    prompts, params = draw_requests(9, seed=5, longest_prompt=12, temperature=0.9)
    params = with_depths(params)
    want = generate(model, prompts, params)
    assert {1, 2, 3, 5} <= {depth for g in want for depth in g.depths}
    config = EngineConfig(
        batching=batching,
        loop=loop,
        deepest=5,
        max_num_seqs=4,
        lanes=3,
        page_size=2,
        prefill_chunk=5,
        kv_cache_memory=2 * small_pool(model, 24, page_size=2),
    )
    engine = Engine(model, config=config)
    for _ in range(2):
        same(engine.generate(prompts, params), want)
    all_memory_is_back(engine)


def test_prompts_read_with_another_depth_are_not_shared():
    model, prompt = calibrated("expert", "hybrid"), [*range(17)]
    engine = Engine(model, config=EngineConfig(page_size=4, deepest=5))
    for depth in (None, 1.6, 4.3, 1.6):
        params = SamplingParams(max_new_tokens=3, temperature=0, depth=depth)
        same(engine.generate([prompt], params), generate(model, [prompt], params))
    assert engine.prefix_cache.hits == 4  # by the last one alone


def test_an_engine_has_a_default_depth_and_a_deepest_one():
    model, prompt = calibrated("expert"), [1, 2, 3]
    params = SamplingParams(max_new_tokens=4, temperature=0)
    engine = Engine(model, config=EngineConfig(depth=1))
    assert set(engine.generate([prompt], params)[0].depths) == {1}
    deep = replace(params, depth="full")
    assert set(engine.generate([prompt], deep)[0].depths) == {3}
    with pytest.raises(ValueError, match=r"5 recursions, but this engine holds 3.*deepest=5"):
        engine.add_request(prompt, replace(params, depth=4.5))
    with pytest.raises(ValueError, match="cannot be had"):
        engine.add_request(prompt, replace(params, depth=9))
    for wrong, said in (
        (dict(deepest=2), "below the model's 3"),
        (dict(max_depth=2, deepest=5), "leave out one"),
        (dict(max_depth=2, depth=2), "leave out one"),
        (dict(depth=4.5), "deepest=5"),
    ):
        with pytest.raises(ValueError, match=said):
            Engine(model, config=EngineConfig(**wrong))


def test_where_one_threshold_serves_all_recursions_an_engine_has_room_for_them():
    model, prompts = calibrated("gain", "hybrid"), [[*range(9)], [4, 5]] * 2
    depths = (1.6, None, 4.3, "full")
    params = [SamplingParams(max_new_tokens=6, temperature=0, depth=depth) for depth in depths]
    engine = Engine(model)
    assert engine.deepest == 5
    same(engine.generate(prompts, params), generate(model, prompts, params))
    assert Engine(model, config=EngineConfig(max_depth=2)).deepest == 3


def test_the_plain_decoder_takes_one_depth_for_all_and_others_by_request():
    model, prompts = calibrated("expert"), [[1, 2, 3], [4, 5]]
    params = [SamplingParams(max_new_tokens=3, depth=depth) for depth in (None, 1)]
    first, second = generate(model, prompts, params, depth="full")
    assert set(first.depths) == {3} and set(second.depths) == {1}
    with pytest.raises(ValueError, match="leave out one"):
        generate(model, prompts, params[0], depth=2, max_depth=2)
