"""The engine against generate.py: the same tokens and depths under every schedule, and nothing
leaks."""

import functools
import random
import threading
from contextlib import contextmanager
from itertools import count, zip_longest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mor.engine import Engine, EngineConfig, SamplingParams, Status
from mor.generation import generate
from mor.model.config import RouterConfig
from tests.conftest import FINAL, cases, final_maker, random_tokens, tiny
from tests.engine.requests import (
    KV,
    POISON,
    all_memory_is_back,
    draw_requests,
    poisoned,
    same,
    small_pool,
)

SCHEDULES = {
    "default": {},
    "depth-wise": dict(batching="depth_wise", page_size=5),
    "lock-step": dict(batching="lock_step", max_num_seqs=5, page_size=3),
    "static": dict(batching="static", max_num_seqs=5, attention="gathered"),
    "few-lanes": dict(max_num_seqs=7, lanes=2, prefill_chunk=5, page_size=3, attention="gathered"),
    "device": dict(loop="device", max_num_seqs=6, lanes=3, page_size=3, attention="gathered"),
    "one-at-a-time": dict(max_num_seqs=1, prefill_chunk=1, page_size=1),
}
# Which models run without ``slow``; under the other schedules: singles.
QUICK = {"depth-wise": "pairs"}
WITH_FINAL = [
    pytest.param(
        final_maker(router),
        schedule,
        marks=() if i == j % len(FINAL) else pytest.mark.slow,
        id=f"{router}-middle_cycle-final-{schedule}",
    )
    for i, router in enumerate(FINAL)
    for j, schedule in enumerate(SCHEDULES)
]
MODES = [
    {},
    dict(batching="depth_wise"),
    dict(loop="device"),
    dict(batching="lock_step"),
    dict(batching="static"),
]


@functools.cache
def plainly_decoded(make_model):
    """A model, requests, and what the plain decoder makes of them: the same for every schedule."""
    model = make_model()
    prompts, params = draw_requests(9, seed=1, longest_output=8, temperature=1.0)
    return model, prompts, params, generate(model, prompts, params)


@pytest.mark.parametrize(
    ("make_model", "schedule"),
    [
        pytest.param(*case.values, schedule, marks=case.marks, id=f"{case.id}-{schedule}")
        for of_model in zip(*(cases(QUICK.get(s, "singles")) for s in SCHEDULES), strict=True)
        for schedule, case in zip(SCHEDULES, of_model, strict=True)
    ]
    + WITH_FINAL,
)
def test_equals_plain_decoding(make_model, schedule):
    model, prompts, params, want = plainly_decoded(make_model)
    if schedule == "device" and model.config.shared_order == "sequence":
        pytest.skip("the device loop is for passes of equal layers")
    if schedule == "one-at-a-time":  # each token is a pass of its own, so a few requests will do
        prompts, params, want = prompts[:2], params[:2], want[:2]
    engine = Engine(model, config=EngineConfig(**SCHEDULES[schedule]))
    same(engine.generate(prompts, params), want)
    all_memory_is_back(engine)


@pytest.mark.parametrize("batch", [1, 2, 33, 64])
@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_batch_sizes(router, batch):
    model = tiny(router)
    prompts, params = draw_requests(batch, seed=3)
    same(Engine(model).generate(prompts, params), generate(model, prompts, params))


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


@pytest.mark.parametrize("mode", [dict(batching="depth_wise"), dict(loop="device"), {}])
def test_final_reads_of_each_token_what_the_plain_decoder_does(mode):
    """Log-probabilities show what tokens alone may hide: such as an entry of the last recursion in
    whose place one of the state after it is."""
    model, prompt = tiny(RouterConfig(kind="random"), kv_strategy="final"), [1, 2, 3]
    params = SamplingParams(max_new_tokens=40, temperature=0, logprobs=True)
    (got,) = Engine(model, config=EngineConfig(**mode)).generate([prompt], params)
    (want,) = generate(model, [prompt], params)
    same([got], [want])
    assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)


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
        own = [output for output in outputs if output.request.request_id == f"#{i}"]
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
    for steps in (0, 6, 18):
        engine = Engine(model, config=EngineConfig(max_num_seqs=6, page_size=2, prefill_chunk=9))
        requests = [engine.add_request(p, q) for p, q in zip(prompts, params, strict=True)]
        for _ in range(steps):
            engine.step()
        for i in (1, 4, 9):
            output = engine.abort(requests[i])
            assert (output is None) == (requests[i].finish_reason in ("stop", "length"))
        while engine.has_unfinished:
            engine.step()
        kept = [i for i, request in enumerate(requests) if request.finish_reason != "abort"]
        same([requests[i] for i in kept], [want[i] for i in kept])
        all_memory_is_back(engine)


def test_bad_requests_are_refused_while_others_go_on():
    model = tiny()
    engine = Engine(model, config=EngineConfig(kv_cache_memory=30_000, page_size=2))
    five = SamplingParams(max_new_tokens=5, temperature=0)
    good = engine.add_request([1, 2, 3], five, request_id="good")
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
        engine.add_request([1], good.params, request_id=good.request_id)
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        engine.generate([[1, 2], []], SamplingParams(max_new_tokens=2))
    for settings_ in (dict(temperature=-1), dict(top_p=0), dict(max_new_tokens=0), dict(top_k=-1)):
        with pytest.raises(ValueError):
            SamplingParams(**settings_)
    while engine.has_unfinished:
        engine.step()
    same([good], generate(model, [[1, 2, 3]], five))
    with pytest.raises(ValueError, match="page of each kind"):
        Engine(model, config=EngineConfig(kv_cache_memory=10))
    with pytest.raises(ValueError, match="lanes"):
        EngineConfig(lanes=0)


def served_as_drawn(data):
    """Arrivals, aborts, lengths and sizes at random: exact, nothing shared wrongly, everything
    comes back."""
    choose = data.draw
    kv = choose(st.sampled_from(KV))
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
            engine.abort(choose(st.sampled_from(requests)))
        assert steps < 3000, "a request starves"
    done = [request for request in requests if request.finish_reason != "abort"]
    assert all(request.status is Status.FINISHED for request in requests)
    if done:
        same(done, generate(model, [r.prompt_ids for r in done], [r.params for r in done]))
    all_memory_is_back(engine)


@pytest.mark.parametrize("examples", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_random_schedules(examples):
    draw = settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    draw(given(data=st.data())(served_as_drawn))()


HOSTILE = [
    ([], SamplingParams(max_new_tokens=1)),
    ([37], SamplingParams(max_new_tokens=1)),
    ([1, -1], SamplingParams(max_new_tokens=1)),
    ([1, 1.0], SamplingParams(max_new_tokens=1)),
    ([[1]], SamplingParams(max_new_tokens=1)),
    ("text", SamplingParams(max_new_tokens=1)),
    (None, SamplingParams(max_new_tokens=1)),
    ([1], dict(max_new_tokens=1)),
    ([1], [SamplingParams()]),
    ([1] * 60, SamplingParams(max_new_tokens=5)),
    ([1] * 50, SamplingParams(max_new_tokens=14)),
    ([1], SamplingParams(max_new_tokens=1, stop_token_ids=(37,))),
]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:a step with")
def test_good_requests_beside_hostile_ones_are_what_they_are_alone(data):
    """Refused, aborted and failing requests, a token that turns states to nan, steps that fail:
    the others are served as if alone, and everything comes back."""
    choose = data.draw
    model = poisoned(
        choose(st.sampled_from(["fixed", "expert_choice", "token_choice"])),
        choose(st.sampled_from(KV)),
    )
    page_size = choose(st.integers(1, 4))
    engine = Engine(
        model,
        config=EngineConfig(
            max_num_seqs=choose(st.integers(1, 5)),
            page_size=page_size,
            kv_cache_memory=small_pool(model, 24, page_size) + choose(st.integers(0, 20_000)),
            attention=choose(st.sampled_from(["auto", "gathered"])),
            **choose(st.sampled_from(MODES)),
        ),
    )
    append, faults = engine.kv.append, []

    def may_fail(*args, **settings):
        if faults:
            raise RuntimeError(faults.pop())
        return append(*args, **settings)

    engine.kv.append = may_fail
    requests, beginning = [], random_tokens(8, seed=9, vocab=POISON).tolist()
    while len(requests) < 8 or engine.has_unfinished:
        if len(requests) < 8 and (not engine.has_unfinished or choose(st.booleans())):
            prompt = [*beginning[: choose(st.integers(0, 8))], choose(st.integers(0, POISON))]
            params = SamplingParams(
                max_new_tokens=choose(st.integers(1, 11)),
                temperature=choose(st.sampled_from([0.0, 1.0])),
                seed=len(requests),
                stop_token_ids=(POISON,),  # it may be drawn, but is not read
            )
            requests.append(engine.add_request(prompt + [7] * choose(st.integers(0, 3)), params))
        action = choose(st.integers(0, 20))
        if action < 8:
            with pytest.raises(ValueError):
                engine.add_request(*choose(st.sampled_from(HOSTILE)))
        elif action == 8:
            engine.abort(choose(st.sampled_from(requests)))
        elif action == 9:
            faults.append("a fault")
        engine.step()
        check_pages(engine)
    bad = [r for r in requests if POISON in r.prompt_ids or r.finish_reason == "abort"]
    good = [r for r in requests if r not in bad and r.error is None]
    assert all(r.error is None or "not finite" in r.error or "fault" in r.error for r in requests)
    assert all(r.finish_reason in ("error", "abort") and not r.token_ids for r in bad if r.error)
    assert all(r.error or r.finish_reason == "abort" for r in bad)
    if good:
        same(good, generate(model, [r.prompt_ids for r in good], [r.params for r in good]))
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


@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_soak(count):
    """Requests come, go and are aborted; pages are back at zero and nothing piles up."""
    import gc

    model = tiny(num_recursions=2, sharing="cycle", num_layers=2)
    engine = Engine(
        model, config=EngineConfig(max_num_seqs=32, page_size=4, kv_cache_memory=300_000)
    )
    draw, number, objects = random.Random(0), 0, []
    while number < count or engine.has_unfinished:
        while number < count and len(engine.requests) < 48:
            prompt = [draw.randrange(37) for _ in range(draw.randint(1, 12))]
            engine.add_request(
                prompt, SamplingParams(max_new_tokens=draw.randint(1, 12), seed=number)
            )
            number += 1
            if number % (count // 4) == 0:
                gc.collect()
                objects.append(len(gc.get_objects()))
        if draw.random() < 0.2:
            engine.abort(draw.choice(list(engine.requests)))
        engine.step()
    assert objects[-1] < objects[0] * 1.05  # as many objects at the end as after a quarter
    all_memory_is_back(engine)


def test_own_and_given_ids_do_not_collide():
    engine = Engine(tiny())
    params = SamplingParams(max_new_tokens=3, temperature=0)
    engine.add_request([1], params, request_id="1")
    assert [engine.add_request([1], params).request_id for _ in range(2)] == ["#1", "#2"]
    given = [engine.add_request([1], params, request_id=i).request_id for i in ("2", "3", "a#4")]
    assert given == ["2", "3", "a#4"]
    with pytest.raises(ValueError, match=r"does not begin with #.*got '#9'"):
        engine.add_request([1], params, request_id="#9")


def test_a_bad_prompt_of_several_leaves_nothing_behind():
    engine = Engine(tiny())
    with pytest.raises(ValueError, match="prompt 1: token ids must be whole numbers"):
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


def test_a_step_that_fails_is_done_again():
    model = tiny()
    prompts, params = draw_requests(6, seed=3, temperature=1.0)
    engine = Engine(model, config=EngineConfig(page_size=3))
    with failing(engine, lambda call, slots: call == 9), pytest.warns(UserWarning, match="kernel"):
        got = engine.generate(prompts, params)
    same(got, generate(model, prompts, params))
    all_memory_is_back(engine)


@pytest.mark.parametrize("mode", [{}, dict(loop="device"), dict(batching="lock_step")])
@pytest.mark.filterwarnings("ignore:a step with")
def test_a_request_with_which_every_step_fails_ends_alone(mode):
    model = tiny()
    prompts, params = draw_requests(6, seed=3, temperature=1.0)
    engine = Engine(model, config=EngineConfig(page_size=3, **mode))

    def is_bad(call, slots):
        return any(r.prompt_ids == prompts[3] and r.slot in slots for r in engine.requests.values())

    with failing(engine, is_bad):
        got = engine.generate(prompts, params)
    assert got[3].finish_reason == "error" and "RuntimeError: kernel" in got[3].error
    want = generate(model, prompts, params)
    same(got[:3] + got[4:], want[:3] + want[4:])
    same(engine.generate(prompts, params), want)
    all_memory_is_back(engine)


def test_an_interrupted_step_leaves_a_usable_engine():
    model = tiny()
    prompts, params = draw_requests(6, seed=3)
    engine = Engine(model, config=EngineConfig(page_size=3))
    waiting = engine.add_request(prompts[0], params[0])
    ninth = failing(engine, lambda call, slots: call == 9, KeyboardInterrupt)
    with ninth, pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, params)
    assert list(engine.requests.values()) == [waiting], "generate takes its own with it"
    while engine.has_unfinished:
        engine.step()
    same([waiting], generate(model, prompts[:1], params[:1]))
    all_memory_is_back(engine)


def test_an_engine_that_cannot_go_on_says_so():
    engine, short = Engine(tiny()), SamplingParams(max_new_tokens=2)
    request = engine.add_request([1, 2], short)

    def lost():
        raise RuntimeError("the device is lost")

    with failing(engine, lambda call, slots: True):
        engine.kv.clear = lost
        (output,) = engine.step()
    assert output.request is request and request.finish_reason == "error"
    assert "kernel" in request.error and not engine.has_unfinished
    uses = (lambda: engine.add_request([1], short), lambda: engine.generate([[1]], short))
    for use in (engine.step, *uses):
        with pytest.raises(RuntimeError, match=r"has stopped.*kernel.*make a new one"):
            use()


@contextmanager
def failing(engine, when, error=RuntimeError):
    """Passes raise ``error`` when(number of the call, slots)."""
    append, calls = engine.kv.append, count(1)

    def fail(slot, *args, **settings):
        if when(next(calls), slot.tolist()):
            raise error("kernel")
        return append(slot, *args, **settings)

    engine.kv.append = fail
    yield
    engine.kv.append = append


def test_an_engine_serves_several_threads():
    model = tiny()
    prompts, params = draw_requests(6, seed=3, temperature=1.0)
    engine, found = Engine(model, config=EngineConfig(max_num_seqs=3, page_size=3)), {}

    def generate_all():
        found[threading.get_ident()] = [r.token_ids for r in engine.generate(prompts, params)]

    def stream_all():
        tokens = {}
        for output in engine.stream(prompts, params):
            tokens.setdefault(output.request.number, []).append(output.token_id)
        found[threading.get_ident()] = [tokens[number] for number in sorted(tokens)]

    threads = [threading.Thread(target=t) for t in (generate_all, stream_all) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = [generation.token_ids for generation in generate(model, prompts, params)]
    assert list(found.values()) == [want] * 4
    all_memory_is_back(engine)


def test_streams_side_by_side_lose_nothing():
    model = tiny()
    prompts, params = draw_requests(2, seed=3)
    engine, found = Engine(model), ([], [])
    streams = [engine.stream([p], [q]) for p, q in zip(prompts, params, strict=True)]
    for outputs in zip_longest(*streams):
        for output, tokens in zip(outputs, found, strict=True):
            tokens += [output.token_id] if output else []
    assert list(found) == [g.token_ids for g in generate(model, prompts, params)]


def test_a_reader_that_fails_takes_its_requests_alone():
    model = tiny()
    prompts, params = draw_requests(2, seed=3, longest_output=30)
    engine = Engine(model)
    other = engine.add_request(prompts[0], params[0])

    def read():
        for _ in engine.stream([prompts[1]], params[1]):
            raise OSError("the client is gone")

    with pytest.raises(OSError):
        read()
    assert list(engine.requests.values()) == [other]
    while engine.has_unfinished:
        engine.step()
    same([other], generate(model, prompts[:1], params[:1]))


def test_abort_takes_a_request_or_its_id():
    engine, other, short = Engine(tiny()), Engine(tiny()), SamplingParams(max_new_tokens=2)
    first, second, foreign = (e.add_request([1], short) for e in (engine, engine, other))
    for request, named in ((first, first), (second, second.request_id)):
        output = engine.abort(named)
        assert output.request is request and request.finish_reason == "abort"
    assert engine.abort(first) is None, "it has ended already"
    for unknown in ("nobody", 0, None):
        with pytest.raises(ValueError, match=f"no unfinished request has the id {unknown!r}"):
            engine.abort(unknown)
    with pytest.raises(ValueError, match="another engine"):
        engine.abort(foreign)
    with pytest.raises(ValueError, match="request_id must be text"):
        engine.add_request([1], short, request_id=5)
    all_memory_is_back(engine)


def test_abort_during_a_step_waits_for_its_end():
    """As when a stream is collected as garbage, or in a handler of a signal."""
    model = tiny()
    prompts, params = draw_requests(3, seed=3, longest_output=30)
    engine = Engine(model)
    requests = [engine.add_request(p, q) for p, q in zip(prompts, params, strict=True)]

    def abort(call, slots):
        if requests[1].finish_reason is None and call > 3:
            engine.abort(requests[1])
        return False

    with failing(engine, abort):
        while engine.has_unfinished:
            engine.step()
    assert requests[1].finish_reason == "abort"
    want = generate(model, prompts, params)
    same(requests[::2], want[::2])
    all_memory_is_back(engine)


@pytest.mark.parametrize("prompts", ["hi", [1, 2], [], None])
def test_what_is_no_list_of_prompts_is_refused_at_once(prompts):
    engine = Engine(tiny())
    for serve in (engine.generate, engine.stream):
        with pytest.raises(ValueError, match="prompts"):
            serve(prompts)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        (dict(tokenizer=EngineConfig()), "tokenizer cannot be of type EngineConfig"),
        (dict(config={}), "config cannot be of type dict"),
        (dict(config=EngineConfig(max_len=65)), "max_len must lie in 1..64"),
        (dict(model="runs/mor"), "model cannot be of type str"),
    ],
)
def test_an_engine_is_made_of_what_belongs_to_it(settings_, words):
    with pytest.raises(ValueError, match=words):
        Engine(**dict(model=tiny()) | settings_)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(), "max_len=1000000000000,.*need .* GB.*lower them in EngineConfig"),
        (dict(max_len=64, max_num_seqs=10**12), "max_num_seqs=1000000000000, max_len=64"),
        (dict(max_len=64, page_size=10**12), "page_size=1000000000000"),
        (dict(max_len=10**9, kv_cache_memory=10**15), "kv_cache_memory=1000000000000000"),
    ],
)
def test_an_engine_beyond_the_memory_names_its_sizes(sizes, words):
    model, short = tiny(max_seq_len=10**12), SamplingParams(max_new_tokens=3, temperature=0)
    with pytest.raises(ValueError, match=words):
        Engine(model, config=EngineConfig(**sizes))
    engine = Engine(model, config=EngineConfig(max_len=64, kv_cache_memory=10**15))
    same(engine.generate([[1]], short), generate(model, [[1]], short))


@pytest.mark.parametrize("error", [MemoryError, RuntimeError("can't allocate memory")])
def test_memory_that_is_refused_later_is_named_too(error, monkeypatch):
    def refused(*_, **__):
        raise error

    monkeypatch.setattr("mor.engine.engine.PagedKV", refused)
    with pytest.raises(ValueError, match=r"max_num_seqs=64.*more memory than there is"):
        Engine(tiny())
