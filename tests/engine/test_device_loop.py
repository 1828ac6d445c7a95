"""The loop on the device: the same tokens, stops and pages."""

from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mor.engine import Engine, EngineConfig, SamplingParams, device_loop
from mor.engine.device_loop import MAX_STOP_TOKENS, DeviceLoop, Variant
from mor.generation import generate
from mor.model.config import RouterConfig
from tests.conftest import tiny
from tests.engine.requests import KV, all_memory_is_back, draw_requests, same, small_pool


@pytest.mark.parametrize(
    ("page_size", "longest", "kv_strategy"),
    [
        pytest.param(*size, kv, marks=() if i in (j, 3) else pytest.mark.slow)
        for i, size in enumerate([(16, 31), (16, 47), (8, 31), (5, 24)])
        for j, kv in enumerate(KV)
    ],
)
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
    with pytest.raises(ValueError, match="shared_order='cycle'"):
        Engine(tiny("fixed", sharing="sequence"), config=EngineConfig(loop="device"))
    with pytest.raises(ValueError, match="made for batching='depth_wise'"):
        EngineConfig(loop="device", batching="static")


def test_more_stop_tokens_than_the_device_looks_for():
    model = tiny()
    prompts, params = draw_requests(6, seed=2, longest_output=20, temperature=1.0)
    free = generate(model, prompts, params)
    last = [generation.token_ids[-1] for generation in free]
    others = tuple(i for i in range(37) if i not in last)[:MAX_STOP_TOKENS]
    params = [SamplingParams(**{**vars(p), "stop_token_ids": (*others, *last)}) for p in params]
    engine = Engine(model, config=EngineConfig(loop="device", max_num_seqs=4))
    same(engine.generate(prompts, params), generate(model, prompts, params))
    all_memory_is_back(engine)


FROM_THE_HOST = {"lift_fresh"}  # a tensor was made of numbers of Python
TO_THE_HOST = {"item", "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}


class StaysOnTheDevice(TorchDispatchMode):
    """Fails at what no CUDA graph can hold: copies from the host, and shapes or numbers that the
    host must wait for."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else []
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        assert name not in FROM_THE_HOST | TO_THE_HOST and not by_mask, name
        assert (kwargs or {}).get("device") in (None, torch.device("cpu"))
        return operation(*args, **(kwargs or {}))


def test_the_check_of_what_a_graph_can_hold():
    x, index = torch.zeros(4), torch.tensor([1, 2])
    for wrong in (
        lambda: x.__setitem__(index, 1),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: float(x[0]),
        lambda: torch.tensor([1]),
    ):
        with torch.no_grad(), StaysOnTheDevice(), pytest.raises(AssertionError):
            wrong()


@pytest.mark.parametrize(
    ("router", "kv_strategy"),
    [
        pytest.param(router, kv, marks=() if i == 1 or i % 3 == j else pytest.mark.slow)
        for i, router in enumerate(
            ["fixed", "expert_choice", "token_choice", "random", "position", "frequency"]
        )
        for j, kv in enumerate(KV)
    ],
)
def test_a_launch_needs_nothing_from_the_host(router, kv_strategy):
    """So CUDA can record it. Greedy and sampled; fp32 and bf16 take the same operations but for the
    linear layers, so each stands with one of them."""
    for temperature, dtype in ((0, torch.float32), (1.0, torch.bfloat16)):
        model = tiny(router, kv_strategy=kv_strategy).to(dtype)
        params = SamplingParams(max_new_tokens=9, temperature=temperature)
        engine = Engine(model, config=EngineConfig(loop="device", max_num_seqs=3))
        for prompt in ([1], [2], [3]):
            engine.add_request(prompt, params)
        record = engine.strategy.steps._run

        def run(*args, record=record):
            with StaysOnTheDevice():
                record(*args)

        engine.strategy.steps._run = run
        assert len(engine.step()) >= 3


@torch.no_grad()
def test_the_idle_slot_never_overflows():
    """It goes through the block again and again, and with the paper's gate every pass adds to its
    state; no coda resets it while tokens keep all lanes of the coda busy."""
    model = tiny(RouterConfig(kind="random", alpha=1.0, gate="paper"))
    engine = Engine(model, config=EngineConfig(loop="device", max_num_seqs=1))
    steps = engine.strategy.steps
    steps._coda(0, Variant(lanes=1, best=0, logprobs=False))  # an idle lane embeds some token
    for _ in range(140):
        steps._block(1, steps.blocks[0][0])
    assert engine.runner.h_SD.isfinite().all()
    logits_MV = engine.runner.head(engine.runner.coda(torch.tensor([engine.kv.idle])))
    assert logits_MV.isfinite().all()


def test_a_launch_does_no_more_than_its_requests_ask_for(monkeypatch):
    """Greedy ones draw nothing, top-k orders few logits, and who leaves takes its wishes along."""
    model = tiny(vocab_size=100)
    engine = Engine(model, config=EngineConfig(loop="device", max_num_seqs=4))
    steps, seen = engine.strategy.steps, []
    run = steps._run
    monkeypatch.setattr(steps, "_run", lambda variant: (seen.append(variant), run(variant)))

    def serve(*params):
        seen.clear()
        prompts = [[i + 1] for i in range(len(params))]
        same(engine.generate(prompts, params), generate(model, prompts, params))
        return set(seen)

    greedy = SamplingParams(max_new_tokens=3, temperature=0)
    few = SamplingParams(max_new_tokens=3, top_k=5, logprobs=True)
    assert serve(greedy, few) == {Variant(2, best=16, logprobs=True)}
    assert serve(few, SamplingParams(max_new_tokens=3)) == {Variant(2, best=None, logprobs=True)}
    assert serve(greedy, greedy, greedy) == {Variant(4, best=0, logprobs=False)}


@pytest.mark.parametrize(
    ("num_recursions", "router", "later"),
    [
        (2, "expert_choice", [1, 0, 1, 0]),
        (3, "expert_choice", [1, 1, 1, 1]),
        (4, "expert_choice", [2, 1, 2, 1]),
        (3, "fixed", [2, 2, 2, 2]),
    ],
)
def test_later_recursions_write_nothing_where_nothing_reads_it(num_recursions, router, later):
    """And there are as many steps for them as passes to be expected, 0.5, 1, 1.5 and 2 a token."""
    model = tiny(router, kv_strategy="shared", num_recursions=num_recursions)
    engine = Engine(model, config=EngineConfig(loop="device", max_num_seqs=6, lanes=3))
    blocks = engine.strategy.steps.blocks
    assert [[b.writes for b in blocks] for blocks in blocks] == [
        [True] + [False] * n for n in later
    ]
    block, passes = engine.runner.block, []

    def watch(slot, layers, *, writes):
        passes.extend(
            (stage, writes) for stage in engine.runner.stage[slot[slot != engine.kv.idle]].tolist()
        )
        block(slot, layers, writes=writes)

    engine.runner.block = watch
    prompts, params = draw_requests(9, seed=2)
    same(engine.generate(prompts, params), generate(model, prompts, params))
    assert {stage for stage, _ in passes} == set(range(num_recursions))
    assert all(writes == (stage == 0) for stage, writes in passes)


@pytest.mark.parametrize(("num_recursions", "steps"), [(1, 4), (2, 6), (3, 8), (4, 10)])
def test_a_launch_has_as_many_block_steps_as_passes_are_expected(num_recursions, steps):
    """With more, blocks run half empty; with fewer, codas do."""
    router = "expert_choice" if num_recursions > 1 else "fixed"
    engine = Engine(tiny(router, num_recursions=num_recursions), config=EngineConfig(loop="device"))
    assert sum(map(len, engine.strategy.steps.blocks)) == steps


# What a CUDA graph does, on the CPU: it is recorded once, and repeats those operations on the same
# memory, whatever the host has done since.


class Recording(TorchDispatchMode):
    """Operations, to be repeated as a CUDA graph does: what they make is put where it was."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, made))
        return made

    def replay(self):
        for operation, args, kwargs, made in self.done:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """Steps are recorded as on CUDA. Gives the settings of each recording."""
    settings = []

    def graph(recording, pool, **given):
        settings.append(given)
        return recording

    for name in ("Stream", "stream", "current_stream", "graph_pool_handle", "device"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    under_way, send, fetch = set(), device_loop._Mail.send, device_loop._Mail.fetch

    def send_once(mail, x):
        assert id(mail) not in under_way, "pinned memory is written anew while it may be read"
        under_way.add(id(mail))
        send(mail, x)

    monkeypatch.setattr(device_loop._Mail, "send", send_once)
    monkeypatch.setattr(device_loop._Mail, "fetch", lambda m: (under_way.clear(), fetch(m))[1])
    return settings


@pytest.mark.parametrize("kv_strategy", KV)
def test_recorded_steps_decode_as_the_plain_decoder(kv_strategy, graphs):
    """Starts too, of any number of requests; nothing depends on what the host had when they were
    recorded. Other threads may use the device meanwhile."""
    model = tiny("expert_choice", kv_strategy=kv_strategy)
    settings = EngineConfig(loop="device", max_num_seqs=5, lanes=4, attention="gathered")
    engine = Engine(model, config=settings)
    engine.strategy.steps.graphed = True
    for temperature in (0, 1.0):
        prompts, params = draw_requests(8, seed=4, temperature=temperature)
        same(engine.generate(prompts, params), generate(model, prompts, params))
    all_memory_is_back(engine)
    starts = {key for key in engine.strategy.steps.graphs if isinstance(key, int)}
    assert starts == {2, 8} and len(graphs) == len(engine.strategy.steps.graphs)
    assert all(given == {"capture_error_mode": "thread_local"} for given in graphs)


def test_a_recording_that_fails_leaves_the_requests_as_they_were(graphs):
    model = tiny()
    engine = Engine(model, config=EngineConfig(loop="device", max_num_seqs=3, attention="gathered"))
    steps, prompts = engine.strategy.steps, [[1], [2], [3]]
    steps.graphed = True
    params = SamplingParams(max_new_tokens=9, temperature=0)
    for prompt in prompts:
        engine.add_request(prompt, params)
    engine.step()
    live, run = steps.live.clone(), steps._run
    assert live.any()
    steps.graphs.clear()
    steps._run = MagicMock(side_effect=MemoryError("no room for a graph"))
    with pytest.raises(MemoryError), torch.inference_mode():
        steps.launch([0, 1, 2])
    assert torch.equal(steps.live, live)
    steps._run = run
    running = list(engine.requests.values())
    while engine.has_unfinished:
        engine.step()
    same(running, generate(model, prompts, params))


# What only a GPU shows: tokens and depths as of the plain decoder there, from recorded graphs.


@pytest.fixture
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_cuda(model, prompts, params, **settings):
    """Requests served from graphs, and the engine."""
    engine = Engine(model, config=EngineConfig(**settings))
    assert isinstance(engine.strategy, DeviceLoop)
    got = engine.generate(prompts, params)
    assert engine.strategy.steps.graphs
    return got, engine


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("router", ["fixed", "expert_choice", "token_choice", "random"])
@pytest.mark.parametrize("kv_strategy", KV)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_cuda_graphs_decode_as_the_plain_decoder(router, kv_strategy, temperature):
    model = tiny(router, kv_strategy=kv_strategy, dim=64, head_dim=16).cuda()
    prompts, params = draw_requests(12, temperature=temperature)
    got, _ = on_cuda(model, prompts, params, max_num_seqs=8, lanes=4, compile=False)
    same(got, generate(model, prompts, params))


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("kv_strategy", KV)
def test_compiled_graphs_decode_as_the_plain_decoder(kv_strategy):
    model = tiny(kv_strategy=kv_strategy, dim=64, head_dim=16).cuda()
    prompts, params = draw_requests(12, temperature=1.0)
    got, engine = on_cuda(model, prompts, params, max_num_seqs=8, lanes=4)
    assert engine.runner.compiled
    same(got, generate(model, prompts, params))


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("top_k", [5, 20])
def test_cuda_graphs_draw_among_the_best(top_k):
    model = tiny(vocab_size=500, dim=64, head_dim=16).cuda()
    params = [
        SamplingParams(max_new_tokens=9, top_k=top_k, top_p=0.9, seed=i, logprobs=True)
        for i in range(8)
    ]
    prompts = [[i + 1, i + 2] for i in range(8)]
    got, _ = on_cuda(model, prompts, params, max_num_seqs=8, compile=False)
    want = generate(model, prompts, params)
    same(got, want)
    for request, generation in zip(got, want, strict=True):
        assert request.logprobs == pytest.approx(generation.logprobs, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("kv_strategy", KV)
def test_long_contexts_on_cuda(kv_strategy):
    """Few queries over thousands of entries: attention splits the context."""
    model = tiny(kv_strategy=kv_strategy, dim=64, head_dim=16, max_seq_len=3000).cuda()
    prompts = [[(i * j) % 37 for j in range(2500 + i)] for i in (1, 2)]
    params = SamplingParams(max_new_tokens=12, temperature=0)
    got, _ = on_cuda(model, prompts, params, max_num_seqs=2, compile=False)
    same(got, generate(model, prompts, params))


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("kv_strategy", KV)
def test_preemption_and_cached_prefixes_on_cuda(kv_strategy):
    model = tiny(kv_strategy=kv_strategy, dim=64, head_dim=16).cuda()
    prompts, _ = draw_requests(9, seed=3, longest_prompt=8)
    beginning = prompts[0] * 2
    prompts = [beginning + prompt for prompt in prompts]
    params = SamplingParams(max_new_tokens=15, temperature=0)
    longest = max(map(len, prompts)) + 15
    budget = small_pool(model, longest, page_size=2)
    got, engine = on_cuda(
        model,
        prompts,
        params,
        max_num_seqs=8,
        lanes=4,
        page_size=2,
        kv_cache_memory=budget,
        compile=False,
    )
    same(got, generate(model, prompts, params))
    assert engine.scheduler.preemptions > 0
    again = engine.generate(prompts[:2], params)
    assert engine.prefix_cache.hits > 0
    same(again, generate(model, prompts[:2], params))
    all_memory_is_back(engine)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_strategy", KV)
@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_on_cuda_stays_close_to_the_plain_decoder(kv_strategy, compiled):
    """Roundings differ, so single tokens may. Each token of the engine must be nearly the best of a
    full forward over what it wrote."""
    model = tiny(kv_strategy=kv_strategy, dim=64, head_dim=16).cuda().bfloat16()
    prompts, _ = draw_requests(8)
    params = SamplingParams(max_new_tokens=12, temperature=0)
    got, _ = on_cuda(model, prompts, params, max_num_seqs=8, compile=compiled)
    close = []
    for request in got:
        ids = torch.tensor([request.prompt_ids + request.token_ids], device="cuda")
        with torch.no_grad():
            logits_TV = model(ids).logits_BTV[0].float()
        at = range(len(request.prompt_ids) - 1, ids.shape[1] - 1)
        best = logits_TV[at].amax(-1) - logits_TV[at, request.token_ids]
        close += (best < 0.02 * logits_TV[at].std(-1)).tolist()
    assert sum(close) >= 0.9 * len(close)
