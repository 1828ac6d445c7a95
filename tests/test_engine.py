"""The engine against generate.py: the same tokens and depths under every schedule, and nothing
leaks."""

import functools
import random

import numpy as np
import pytest
import torch
from conftest import cases, random_tokens, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mor.engine import Engine, EngineConfig, SamplingParams, Status
from mor.engine.attention import gathered_attention
from mor.engine.bench import Lengths, load_for
from mor.engine.pages import PagePool
from mor.engine.prefix_cache import PrefixCache, Segment
from mor.engine.sampling import SamplingRows, logprob_rows, sample_rows
from mor.engine.weights import FewRowsLinear, for_decoding
from mor.generation import generate, logprob, sample
from mor.model.config import RouterConfig

SCHEDULES = {
    "default": {},
    "lock-step": dict(batching="lock_step", max_num_seqs=5, page_size=3),
    "static": dict(batching="static", max_num_seqs=5, attention="gathered"),
    "few-lanes": dict(max_num_seqs=7, lanes=2, prefill_chunk=5, page_size=3, attention="gathered"),
    "device": dict(loop="device", max_num_seqs=6, lanes=3, page_size=3, attention="gathered"),
    "one-at-a-time": dict(max_num_seqs=1, prefill_chunk=1, page_size=1),
}


MODES = [{}, {}, dict(loop="device"), dict(batching="lock_step"), dict(batching="static")]


def draw_requests(count, *, seed=0, longest_prompt=20, longest_output=12, temperature=0.0):
    """Prompts and settings of random lengths; some greedy, some sampled if ``temperature`` is not
    0."""
    draw = random.Random(seed)
    prompts = [
        [draw.randrange(37) for _ in range(draw.randint(1, longest_prompt))] for _ in range(count)
    ]
    params = [
        SamplingParams(
            max_new_tokens=draw.randint(1, longest_output),
            temperature=draw.choice([0.0, temperature]),
            seed=i,
        )
        for i in range(count)
    ]
    return prompts, params


def same(got, want):
    """Tokens, depths and reasons of an engine's requests equal those of the plain decoder."""
    for request, generation in zip(got, want, strict=True):
        assert request.token_ids == generation.token_ids
        assert request.depths == generation.depths
        assert request.finish_reason == generation.finish_reason


def all_memory_is_back(engine):
    assert not engine.requests and not engine.scheduler.running and not engine.scheduler.waiting
    engine.scheduler.clear_prefix_cache()
    assert engine.kv.used_bytes == 0
    assert all((pool.owners == 0).all() for pool in engine.kv.pools)
    assert all(sorted(pool._free) == list(range(pool.num_pages)) for pool in engine.kv.pools)


def small_pool(model, tokens, page_size):
    """Bytes that hold one request of ``tokens`` tokens at full depth, and little more."""

    def pools(num_bytes):
        return Engine(
            model,
            config=EngineConfig(page_size=page_size, max_num_seqs=8, kv_cache_memory=num_bytes),
        ).kv

    largest = pools(1 << 30)
    pages = largest.pages_for(tokens)
    num_bytes = sum(n * b for n, b in zip(pages, largest.page_bytes, strict=True))
    while any(pool.num_pages < n for pool, n in zip(pools(num_bytes).pools, pages, strict=True)):
        num_bytes = num_bytes * 21 // 20
    return num_bytes


@functools.cache
def plainly_decoded(make_model):
    """A model, requests, and what the plain decoder makes of them: the same for every schedule."""
    model = make_model()
    prompts, params = draw_requests(9, seed=1, temperature=1.0)
    return model, prompts, params, generate(model, prompts, params)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("make_model", cases())
def test_equals_plain_decoding(make_model, schedule):
    model, prompts, params, want = plainly_decoded(make_model)
    if schedule == "device" and model.config.shared_order == "sequence":
        pytest.skip("the device loop is for passes of equal layers")
    if schedule == "one-at-a-time":  # each token is a pass of its own, so a few requests will do
        prompts, params, want = prompts[:4], params[:4], want[:4]
    engine = Engine(model, config=EngineConfig(**SCHEDULES[schedule]))
    same(engine.generate(prompts, params), want)
    all_memory_is_back(engine)


@pytest.mark.parametrize("make_model", cases())
def test_preemption_in_a_tiny_pool(make_model):
    model = make_model()
    prompts, params = draw_requests(5, seed=2, longest_prompt=8, longest_output=20)
    budget, want = small_pool(model, 28, page_size=2), generate(model, prompts, params)
    for batching in ("depth_wise", "lock_step"):
        config = EngineConfig(
            max_num_seqs=8, page_size=2, kv_cache_memory=budget, prefill_chunk=8, batching=batching
        )
        engine = Engine(model, config=config)
        same(engine.generate(prompts, params), want)
        assert engine.scheduler.preemptions > 0
        all_memory_is_back(engine)


@pytest.mark.parametrize("make_model", cases())
def test_prefix_cache_hits(make_model):
    model = make_model()
    shared = random_tokens(17, seed=5).tolist()
    prompts = [shared[:n] + random_tokens(3, seed=n).tolist() for n in (17, 17, 12, 5, 16)]
    want = generate(model, prompts, SamplingParams(max_new_tokens=9, temperature=0))
    engine = Engine(model, config=EngineConfig(page_size=4, prefill_chunk=7))
    # one after another, so that each can hit
    for prompt, generation in zip(prompts, want, strict=True):
        same(
            engine.generate([prompt], SamplingParams(max_new_tokens=9, temperature=0)), [generation]
        )
    assert engine.prefix_cache.hits >= 3
    same(engine.generate(prompts, SamplingParams(max_new_tokens=9, temperature=0)), want)
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


@pytest.mark.parametrize("batch", [1, 2, 33, 64])
@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_batch_sizes(router, batch):
    model = tiny(router)
    prompts, params = draw_requests(batch, seed=3)
    same(Engine(model).generate(prompts, params), generate(model, prompts, params))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 11, 64])
def test_odd_prefill_chunks(chunk):
    model = tiny(kv_strategy="hybrid")
    prompts, params = draw_requests(7, seed=4, longest_prompt=40)
    engine = Engine(model, config=EngineConfig(prefill_chunk=chunk))
    same(engine.generate(prompts, params), generate(model, prompts, params))


@pytest.mark.parametrize("max_depth", [1, 2])
@pytest.mark.parametrize(
    "router", ["fixed", "expert_choice", "token_choice", "random", "position", "frequency"]
)
def test_capped_depth(router, max_depth):
    model = tiny(router)
    prompts, params = draw_requests(5)
    engine = Engine(model, config=EngineConfig(max_depth=max_depth))
    same(engine.generate(prompts, params), generate(model, prompts, params, max_depth=max_depth))
    with pytest.raises(ValueError, match="max_depth"):
        Engine(model, config=EngineConfig(max_depth=4))


def test_sampling_is_the_same_alone_and_in_a_crowd():
    model = tiny()
    prompts, params = draw_requests(20, seed=6, temperature=1.3)
    crowd = Engine(model).generate(prompts, params)
    for prompt, p, request in zip(prompts, params, crowd, strict=True):
        (alone,) = Engine(model).generate([prompt], p)
        assert alone.token_ids == request.token_ids


def test_tokens_of_different_depths_share_a_pass():
    model = tiny(RouterConfig(kind="random"))
    engine = Engine(model)
    prompts, _ = draw_requests(16)
    engine.generate(prompts, SamplingParams(max_new_tokens=16, temperature=0))
    passes = engine.measured.tokens["block"] / engine.measured.passes["block"]
    # far fewer passes than tokens times depth
    assert engine.measured.passes["block"] < 16 * 3 and passes > 12


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


def test_logprobs():
    model = tiny()
    params = SamplingParams(max_new_tokens=6, temperature=1.0, logprobs=True)
    prompts, _ = draw_requests(3)
    got, want = Engine(model).generate(prompts, params), generate(model, prompts, params)
    for request, generation in zip(got, want, strict=True):
        torch.testing.assert_close(
            torch.tensor(request.logprobs), torch.tensor(generation.logprobs)
        )
    full = (
        model(torch.tensor([prompts[0] + got[0].token_ids])).logits_BTV[0].log_softmax(-1).detach()
    )
    for i, (token, value) in enumerate(zip(got[0].token_ids, got[0].logprobs, strict=True)):
        assert abs(float(full[len(prompts[0]) + i - 1, token]) - value) < 1e-4


def test_stop_tokens_and_stream():
    model = tiny()
    prompts, _ = draw_requests(4)
    free = generate(model, prompts, SamplingParams(max_new_tokens=12, temperature=0))
    params = SamplingParams(
        max_new_tokens=12, temperature=0, stop_token_ids=(free[0].token_ids[3],)
    )
    engine = Engine(model)
    outputs = list(engine.stream(prompts, params))
    for i, generation in enumerate(generate(model, prompts, params)):
        own = [output for output in outputs if output.request.request_id == str(i)]
        assert [output.token_id for output in own] == generation.token_ids
        assert [output.finish_reason for output in own] == [None] * (len(own) - 1) + [
            generation.finish_reason
        ]
    stream = engine.stream(prompts, params)
    next(stream)
    stream.close()  # a reader that goes away leaves nothing behind
    all_memory_is_back(engine)


def test_abort_in_the_middle_leaves_the_others_alone():
    model = tiny()
    prompts, params = draw_requests(10, seed=7, longest_output=30)
    want = generate(model, prompts, params)
    for steps in range(0, 30, 3):
        engine = Engine(model, config=EngineConfig(max_num_seqs=6, page_size=2, prefill_chunk=9))
        requests = [engine.add_request(p, q) for p, q in zip(prompts, params, strict=True)]
        for _ in range(steps):
            engine.step()
        for i in (1, 4, 9):
            output = engine.abort(str(i))
            assert (output is None) == (requests[i].finish_reason in ("stop", "length"))
        while engine.has_unfinished:
            engine.step()
        kept = [i for i, request in enumerate(requests) if request.finish_reason != "abort"]
        same([requests[i] for i in kept], [want[i] for i in kept])
        all_memory_is_back(engine)
    assert engine.abort("nobody") is None


def test_bad_requests_are_refused_while_others_go_on():
    model = tiny()
    engine = Engine(model, config=EngineConfig(kv_cache_memory=30_000, page_size=2))
    good = engine.add_request([1, 2, 3], SamplingParams(max_new_tokens=5, temperature=0))
    engine.step()
    for prompt, params, message in [
        ([], SamplingParams(), "empty"),
        ([37], SamplingParams(max_new_tokens=1), "outside 0..36"),
        ([1] * 60, SamplingParams(max_new_tokens=5), "a request holds 64"),
        ([1] * 50, SamplingParams(max_new_tokens=14), "raise kv_cache_memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.add_request(prompt, params)
    with pytest.raises(ValueError, match="no tokenizer"):
        engine.add_request("text")
    with pytest.raises(ValueError, match="still unfinished"):
        engine.add_request([1], request_id=good.request_id)
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        engine.generate([[1, 2], []], SamplingParams(max_new_tokens=2))
    for settings_ in (dict(temperature=-1), dict(top_p=0), dict(max_new_tokens=0), dict(top_k=-1)):
        with pytest.raises(ValueError):
            SamplingParams(**settings_)
    while engine.has_unfinished:
        engine.step()
    same([good], generate(model, [[1, 2, 3]], SamplingParams(max_new_tokens=5, temperature=0)))
    with pytest.raises(ValueError, match="page of each kind"):
        Engine(model, config=EngineConfig(kv_cache_memory=10))
    with pytest.raises(ValueError, match="lanes"):
        EngineConfig(lanes=0)


def test_memory_per_token_is_what_costs_says():
    """With pages of one token nothing is rounded up, so the bytes in use are those of the
    entries."""
    from mor.costs import flops as costs

    model = tiny("fixed")
    engine = Engine(model, config=EngineConfig(page_size=1, prefix_caching=False))
    request = engine.add_request([1, 2, 3, 4, 5], SamplingParams(max_new_tokens=30, temperature=0))
    while request.num_read < 10:
        engine.step()
    config, took = model.config, int(engine.runner.took_SR[request.slot].sum())
    own = config.prelude_layers + config.coda_layers
    entries = request.num_read * (own + 3 * config.shared_layers)
    entries += own + took * config.shared_layers  # of the token under way
    assert took and engine.kv.used_bytes == entries * costs.kv_entry_bytes(config, 4)
    assert engine.kv.nbytes <= engine.config.kv_cache_memory


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_schedules(data):
    """Arrivals, aborts, lengths and sizes at random: exact, nothing shared wrongly, everything
    comes back."""
    choose = data.draw
    kv = choose(st.sampled_from(["recursion_wise", "shared", "hybrid"]))
    model = tiny(
        choose(
            st.sampled_from(
                ["fixed", "expert_choice", "token_choice", "random", "position", "frequency"]
            )
        ),
        kv_strategy=kv,
    )
    page_size = choose(st.integers(1, 5))
    engine = Engine(
        model,
        config=EngineConfig(
            max_num_seqs=choose(st.integers(1, 6)),
            lanes=choose(st.one_of(st.none(), st.integers(1, 4))),
            prefill_chunk=choose(st.integers(1, 16)),
            page_size=page_size,
            kv_cache_memory=small_pool(model, 24, page_size) + choose(st.integers(0, 40_000)),
            **choose(st.sampled_from(MODES)),
        ),
    )
    requests, steps = [], 0
    beginnings = random_tokens(3, 8, seed=9).tolist()
    while len(requests) < 8 or engine.has_unfinished:
        if len(requests) < 8 and (not engine.has_unfinished or choose(st.booleans())):
            prompt = beginnings[choose(st.integers(0, 2))][: choose(st.integers(1, 8))]
            prompt = prompt + random_tokens(choose(st.integers(0, 5)), seed=len(requests)).tolist()
            requests.append(
                engine.add_request(
                    prompt, SamplingParams(max_new_tokens=choose(st.integers(1, 11)), temperature=0)
                )
            )
        engine.step()
        steps += 1
        check_pages(engine)
        if choose(st.integers(0, 15)) == 0:
            engine.abort(str(choose(st.integers(0, 7))))
        assert steps < 3000, "a request starves"
    done = [request for request in requests if request.finish_reason != "abort"]
    assert all(request.status is Status.FINISHED for request in requests)
    if done:
        same(done, generate(model, [r.prompt_ids for r in done], [r.params for r in done]))
    all_memory_is_back(engine)


def check_pages(engine):
    """Each page has as many owners as hold it, and no two sequences write to one page."""
    for kind, pool in enumerate(engine.kv.pools):
        held = [0] * pool.num_pages
        streams = slice(0, 1) if kind == 0 else slice(1, None)
        writing = []
        for request in engine.scheduler.running:
            for stream, pages in enumerate(
                engine.kv.pages[request.slot][streams], start=streams.start
            ):
                for page in pages:
                    held[page] += 1
                if (
                    engine.kv.reserved[request.slot, stream]
                    > engine.kv.host_count[request.slot, stream]
                    and pages
                ):
                    row = request.slot * engine.kv.num_streams + stream
                    next_place = engine.kv.table_RL[row, engine.kv.host_count[request.slot, stream]]
                    writing.append(int(next_place) // engine.kv.page_size)
        for _, segment in engine.prefix_cache._segments.values():
            for segment_kind, page in segment.pages:
                if segment_kind == kind:
                    held[page] += 1
        assert held == pool.owners.tolist()
        assert len(writing) == len(set(writing))


def test_soak():
    """2,000 requests come, go and are aborted; pages are back at zero and nothing piles up."""
    import gc

    model = tiny(num_recursions=2, sharing="cycle", num_layers=2)
    engine = Engine(
        model, config=EngineConfig(max_num_seqs=32, page_size=4, kv_cache_memory=300_000)
    )
    draw, number, objects = random.Random(0), 0, []
    while number < 2000 or engine.has_unfinished:
        while number < 2000 and len(engine.requests) < 48:
            prompt = [draw.randrange(37) for _ in range(draw.randint(1, 12))]
            engine.add_request(
                prompt, SamplingParams(max_new_tokens=draw.randint(1, 12), seed=number)
            )
            number += 1
            if number % 500 == 0:
                gc.collect()
                objects.append(len(gc.get_objects()))
        if draw.random() < 0.2:
            engine.abort(draw.choice(list(engine.requests)))
        engine.step()
    assert objects[-1] < objects[0] * 1.05  # as many objects after 2,000 requests as after 500
    all_memory_is_back(engine)


def test_the_count_of_the_host_changes_when_it_is_refreshed():
    """Not before: on CUDA it cannot, and the CPU does the same."""
    kv = Engine(tiny("fixed"), config=EngineConfig(max_num_seqs=2, page_size=4)).kv
    slots, streams = np.array([0, 1]), np.array([0, 2])
    kv.reserve(slots, streams)
    entries = torch.tensor([True, False])
    kv.append(torch.tensor(slots), torch.tensor(streams), torch.zeros(2).long(), entries, kind=1)
    assert kv.host_count.sum() == 0
    kv.refresh()
    assert kv.host_count.nonzero() == ([0], [0]) and kv.host_count[0, 0] == 1
    kv.free_slot(0)
    assert kv.host_count.sum() == 0
    kv.refresh()
    assert kv.host_count.sum() == 0


@pytest.mark.parametrize("batching", ["lock_step", "static"])
def test_a_static_batch_ends_with_its_longest_request(batching):
    engine = Engine(tiny(), config=EngineConfig(max_num_seqs=2, batching=batching))
    long, short, late = (
        engine.add_request([1], SamplingParams(max_new_tokens=n, temperature=0)) for n in (9, 3, 3)
    )
    while late.status is Status.WAITING:
        engine.step()
    assert short.status is Status.FINISHED
    assert (long.status is Status.FINISHED) == (batching == "static")


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


def test_a_compiler_that_does_not_run_is_a_compiler_error(monkeypatch, tmp_path):
    from mor.engine.cpu_attention import CompilerError, compile_library

    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.raises(CompilerError, match="does not run"):
        compile_library("int x;")


def test_int8_weights_stay_close_and_rows_apart():
    model = tiny("fixed", dim=32, head_dim=8)
    prompts, params = draw_requests(6)
    engine = Engine(model, config=EngineConfig(quantize="int8"))
    tokens = random_tokens(4, 20)
    exact, rounded = model(tokens).logits_BTV, engine.runner.model(tokens).logits_BTV
    error = float((rounded - exact).std() / exact.std())
    assert 0 < error < 0.1
    torch.testing.assert_close(engine.runner.model(tokens[:1]).logits_BTV, rounded[:1])
    assert all(r.finish_reason == "length" for r in engine.generate(prompts, params))
    with pytest.raises(ValueError, match="float32"):
        Engine(tiny().double(), config=EngineConfig(quantize="int8"))


KV = ["recursion_wise", "shared", "hybrid"]


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


@pytest.mark.parametrize("loop", ["host", "device"])
@pytest.mark.parametrize("kv_strategy", KV)
@pytest.mark.parametrize(
    "model", [("fixed", "sequence"), ("fixed", "middle_sequence"), ("token_choice", "cycle")]
)
def test_a_request_that_just_fits_is_never_preempted(model, kv_strategy, loop):
    kind, sharing = model
    if loop == "device" and sharing != "cycle":
        pytest.skip("the device loop applies the same layers in every pass")
    model, prompt = tiny(kind, kv_strategy=kv_strategy, sharing=sharing), [1, 2, 3, 4, 5]
    params = SamplingParams(max_new_tokens=20, temperature=0)
    for page_size in (2, 3, 4):
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


def test_more_lanes_than_slots():
    model = tiny()
    prompts, params = draw_requests(9)
    engine = Engine(model, config=EngineConfig(loop="device", max_num_seqs=5, lanes=64))
    same(engine.generate(prompts, params), generate(model, prompts, params))


def test_own_and_given_ids_do_not_collide():
    engine = Engine(tiny())
    params = SamplingParams(max_new_tokens=3, temperature=0)
    engine.add_request([1], params, request_id="1")
    assert [engine.add_request([1], params).request_id for _ in range(2)] == ["2", "3"]


@pytest.mark.parametrize("setting", [dict(seed=2**63), dict(top_k=2**63), dict(top_k=-1)])
def test_sampling_settings_that_no_tensor_holds_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SamplingParams(**setting)


def test_a_bad_prompt_of_several_leaves_nothing_behind():
    engine = Engine(tiny())
    with pytest.raises(TypeError):
        engine.generate([[1, 2], [None]], SamplingParams(max_new_tokens=3))
    all_memory_is_back(engine)


def test_an_aborted_request_streams_nothing_more():
    engine, seen = Engine(tiny()), []
    params = SamplingParams(max_new_tokens=5, temperature=0)
    for output in engine.stream([[1], [2]], params):
        seen.append(output.request.prompt_ids)
        if len(seen) == 1:
            aborted = next(r for r in engine.requests.values() if r is not output.request)
            engine.abort(aborted.request_id)
    assert seen == [seen[0]] * 5


def test_a_compiled_model_is_quantised_too():
    tokens = random_tokens(2, 10)
    plain = for_decoding(tiny(), "int8")(tokens).logits_BTV
    compiled = tiny().compile_blocks(backend="eager")
    quantised = for_decoding(compiled, "int8")
    torch.testing.assert_close(quantised(tokens).logits_BTV, plain)
    assert "enter" in vars(compiled.prelude[0]) and "enter" not in vars(quantised.prelude[0])


def test_a_steady_load_starts_full():
    load = load_for("", tiny(), batch=24, slots=24, lengths=Lengths(mean=6, deviation=3))
    assert len(load.engine.requests) == 24
    load.turn(0.05)
    assert len(load.engine.requests) == 24


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 31, 64])
def test_few_rows_gives_the_product_at_any_number_of_rows(rows):
    weight, x = torch.randn(24, 12), torch.randn(rows, 12)
    torch.testing.assert_close(FewRowsLinear(weight)(x), x @ weight.T)


def test_few_rows_is_the_same_model_on_the_same_memory():
    model, tokens = tiny(), random_tokens(3, 10)
    fast = for_decoding(model, None)
    torch.testing.assert_close(fast(tokens).logits_BTV, model(tokens).logits_BTV)
    block, own = fast.recursions.shared_blocks[0], model.recursions.shared_blocks[0]
    assert block.feed_forward.up_proj.weight is own.feed_forward.up_proj.weight
    assert fast.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert type(own.feed_forward.up_proj) is torch.nn.Linear
    model.requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.mul_(1.1)
    torch.testing.assert_close(fast(tokens).logits_BTV, model(tokens).logits_BTV)
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_rows_are_sampled_as_each_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 37, generator=generator) * 3
    params = [
        SamplingParams(
            temperature=(0.0, 0.7, 1.5)[i % 3],
            top_k=(0, 1, 5)[i % 4 % 3],
            top_p=(1.0, 0.5)[i % 2],
            seed=i,
        )
        for i in range(40)
    ]
    rows = SamplingRows.of(params, list(range(40)), logits.device)
    tokens = sample_rows(logits, rows).tolist()
    assert tokens == [sample(logits[i], p, i) for i, p in enumerate(params)]
    assert len(set(tokens)) > 10
    values = logprob_rows(logits, torch.tensor(tokens)).tolist()
    assert values == pytest.approx([logprob(logits[i], t) for i, t in enumerate(tokens)])


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


def test_page_pool_refuses_double_release():
    pool = PagePool(2)
    page = pool.allocate()
    pool.share(page)
    pool.release(page)
    assert pool.num_free == 1
    pool.release(page)
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="released before"):
        pool.release(page)
    with pytest.raises(AssertionError, match="no owner"):
        pool.share(page)


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
