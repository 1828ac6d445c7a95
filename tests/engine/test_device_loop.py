"""The loop on the device: the same tokens, stops and pages."""

import pytest
import torch

from mor.engine import Engine, EngineConfig, SamplingParams
from mor.generation import generate
from tests.conftest import tiny
from tests.engine.requests import KV, all_memory_is_back, draw_requests, same, small_pool


@pytest.mark.parametrize("kv_strategy", KV)
@pytest.mark.parametrize("page_size,longest", [(16, 31), (16, 47), (8, 31), (5, 24)])
def test_the_device_loop_takes_no_more_pages_than_a_request_may_need(
    kv_strategy, page_size, longest
):
    model, prompt = tiny(kv_strategy=kv_strategy), [1, 2, 3]
    params = SamplingParams(max_new_tokens=longest - 3, temperature=0)
    engine = Engine(
        model,
        config=EngineConfig(
            loop="device", max_num_seqs=1, lanes=8, max_len=longest, page_size=page_size
        ),
    )
    same(engine.generate([prompt], params), generate(model, [prompt], params))
    assert engine.scheduler.preemptions == 0
    all_memory_is_back(engine)


def test_more_lanes_than_slots():
    model = tiny()
    prompts, params = draw_requests(9)
    engine = Engine(model, config=EngineConfig(loop="device", max_num_seqs=5, lanes=64))
    same(engine.generate(prompts, params), generate(model, prompts, params))


def test_device_loop_stops_where_it_should():
    """Stop tokens, logprobs, more requests than slots, tiny pools: all as the plain decoder."""
    model = tiny()
    prompts, _ = draw_requests(9, seed=3, longest_prompt=8)
    free = generate(model, prompts, SamplingParams(max_new_tokens=15, temperature=0))
    stops = tuple({g.token_ids[4] for g in free[:2]})
    params = SamplingParams(max_new_tokens=15, temperature=0, stop_token_ids=stops, logprobs=True)
    want = generate(model, prompts, params)
    assert {g.finish_reason for g in want} == {"stop", "length"}
    budget = small_pool(model, 28, page_size=2)
    engine = Engine(
        model,
        config=EngineConfig(
            loop="device", max_num_seqs=8, lanes=4, page_size=2, kv_cache_memory=budget
        ),
    )
    got = engine.generate(prompts, params)
    same(got, want)
    assert engine.scheduler.preemptions > 0
    for request, generation in zip(got, want, strict=True):
        assert request.logprobs == pytest.approx(generation.logprobs, abs=1e-4)
    all_memory_is_back(engine)
    with pytest.raises(ValueError, match="up to 16 stop tokens"):
        engine.add_request([1], SamplingParams(max_new_tokens=5, stop_token_ids=tuple(range(17))))
    with pytest.raises(ValueError, match="shared_order='cycle'"):
        Engine(tiny("fixed", sharing="sequence"), config=EngineConfig(loop="device"))
    with pytest.raises(ValueError, match="made for batching='depth_wise'"):
        EngineConfig(loop="device", batching="static")


@pytest.mark.gpu
@pytest.mark.parametrize("router", ["fixed", "expert_choice", "token_choice", "random"])
@pytest.mark.parametrize("kv_strategy", ["recursion_wise", "shared", "hybrid"])
def test_cuda_graphs_decode_as_the_plain_decoder(router, kv_strategy):
    from mor.engine import Engine, EngineConfig, SamplingParams
    from mor.engine.device_loop import DeviceLoop
    from mor.generation import generate
    from tests.conftest import tiny

    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny(router, kv_strategy=kv_strategy, dim=64, head_dim=16).cuda()
    prompts = [[i + 1, i + 2, i + 3] for i in range(12)]
    params = SamplingParams(max_new_tokens=12, temperature=0)
    engine = Engine(model, config=EngineConfig(max_num_seqs=8, lanes=4))
    assert isinstance(engine.strategy, DeviceLoop)
    got, want = engine.generate(prompts, params), generate(model, prompts, params)
    assert engine.strategy.steps.graphs
    assert [r.token_ids for r in got] == [w.token_ids for w in want]
    assert [r.depths for r in got] == [w.depths for w in want]
