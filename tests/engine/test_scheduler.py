"""Who runs: preemption in small pools, and none where a request fits."""

import pytest

from mor.engine import Engine, EngineConfig, SamplingParams
from mor.engine.pages import SHARED
from mor.generation import generate
from mor.model.config import RouterConfig
from tests.conftest import cases, some, tiny
from tests.engine.requests import KV, all_memory_is_back, draw_requests, same, small_pool


@pytest.mark.parametrize(
    ("make_model", "batching"),
    some(
        [
            pytest.param(*case.values, batching, marks=marks, id=f"{case.id}-{batching}")
            for i, case in enumerate(cases("singles", with_final=True))
            for j, batching in enumerate(("depth_wise", "lock_step"))
            for marks in [case.marks or (() if i % 2 == j else pytest.mark.slow)]
        ],
        2,
    ),
)
def test_preemption_in_a_tiny_pool(make_model, batching):
    model = make_model()
    count = 5 if model.config.least_depth else 10  # tokens without recursions take few pages
    prompts, params = draw_requests(count, seed=2, longest_prompt=8, longest_output=20)
    budget, want = small_pool(model, 28, page_size=2), generate(model, prompts, params)
    config = EngineConfig(
        max_num_seqs=8, page_size=2, kv_cache_memory=budget, prefill_chunk=8, batching=batching
    )
    engine = Engine(model, config=config)
    same(engine.generate(prompts, params), want)
    assert engine.scheduler.preemptions > 0
    all_memory_is_back(engine)


def test_room_for_the_two_places_of_a_first_entry():
    """With pages of one token and ``final``, a token's first entry takes two pages."""
    config = EngineConfig(max_num_seqs=4, page_size=1, batching="depth_wise")
    engine = Engine(tiny(kv_strategy="final"), config=config)
    requests = [engine.add_request([i], SamplingParams(max_new_tokens=3)) for i in range(4)]
    while engine.kv.pools[SHARED].num_free > 5:
        engine.kv.pools[SHARED].allocate()
    engine.step()
    assert [request.preemptions for request in requests] == [0, 0, 1, 1]
    assert not any(request.faults for request in requests)


def test_full_lanes_come_before_coda():
    """With more slots than lanes every pass is full, and coda sees the exits of several passes
    together."""
    model, lanes = tiny(RouterConfig(kind="random")), 8
    engine = Engine(model, config=EngineConfig(max_num_seqs=24, lanes=lanes))
    prompts, _ = draw_requests(24)
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(max_new_tokens=40, temperature=0))
    for _ in range(60):
        engine.step()
    assert engine.measured.tokens["block"] == lanes * engine.measured.passes["block"]
    assert engine.measured.tokens["coda"] > 16 * engine.measured.passes["coda"]


@pytest.mark.parametrize("loop", ["host", "device"])
@pytest.mark.parametrize(
    ("kv_strategy", "page_size"),
    [
        pytest.param(kv, page_size, marks=() if i == j else pytest.mark.slow)
        for i, kv in enumerate(KV)
        for j, page_size in enumerate((2, 3, 4))
    ],
)
@pytest.mark.parametrize(
    "model", [("fixed", "sequence"), ("fixed", "middle_sequence"), ("token_choice", "cycle")]
)
def test_a_request_that_just_fits_is_never_preempted(model, kv_strategy, page_size, loop):
    kind, sharing = model
    if loop == "device" and sharing != "cycle":
        pytest.skip("the device loop applies the same layers in every pass")
    model, prompt = tiny(kind, kv_strategy=kv_strategy, sharing=sharing), [1, 2, 3, 4, 5]
    params = SamplingParams(max_new_tokens=20, temperature=0)
    budget = small_pool(model, 24, page_size)
    engine = Engine(
        model, config=EngineConfig(page_size=page_size, kv_cache_memory=budget, loop=loop)
    )
    request = engine.add_request(prompt, params)
    for _ in range(200):
        engine.step()
    same([request], generate(model, [prompt], params))
    assert request.preemptions == 0
    all_memory_is_back(engine)
