"""The strategy follows the load, and what comes out does not depend on it."""

import random

import pytest

from mor.engine import Engine, EngineConfig
from mor.generation import generate
from mor.model.config import RouterConfig
from tests.conftest import tiny
from tests.engine.requests import all_memory_is_back, draw_requests, same, small_pool


def served_at_random(engine, prompts, params, seed):
    """The requests, which come at random, so that now more and now fewer run than there are
    lanes; and how often the strategy changed."""
    draw, requests, used, changes = random.Random(seed), [], "", 0
    while len(requests) < len(prompts) or engine.has_unfinished:
        if len(engine.requests) < 3 and draw.random() < 0.3:
            for i in range(len(requests), min(len(prompts), len(requests) + draw.randint(1, 6))):
                requests.append(engine.add_request(prompts[i], params[i]))
        before = dict(engine.measured.passes)
        engine.step()
        grown = {k for k, n in engine.measured.passes.items() if n > before.get(k, 0)}
        now = "lock-step" if "token" in grown else "depth-wise" if "enter" in grown else used
        changes, used = changes + (now != used), now
    return requests, changes


@pytest.mark.parametrize("short_of_pages", [False, True])
@pytest.mark.parametrize(
    ("router", "kv_strategy"),
    [
        ("expert_choice", "hybrid"),
        ("token_choice", "recursion_wise"),
        ("fixed", "shared"),
        pytest.param("random", "final", marks=pytest.mark.slow),
    ],
)
def test_changing_between_strategies_at_random_equals_plain_decoding(
    router, kv_strategy, short_of_pages
):
    model, seed = tiny(router, kv_strategy=kv_strategy), 3 + short_of_pages
    prompts, params = draw_requests(16, seed=seed, longest_prompt=8, longest_output=12)
    prompts[1::3] = [prompts[0] + prompt[:4] for prompt in prompts[1::3]]  # cached prefixes
    memory = small_pool(model, 28, page_size=2) if short_of_pages else None
    engine = Engine(
        model,
        config=EngineConfig(
            max_num_seqs=8, lanes=3, page_size=2, prefill_chunk=8, kv_cache_memory=memory
        ),
    )
    requests, changes = served_at_random(engine, prompts, params, seed)
    same(requests, generate(model, prompts, params))
    assert changes >= 4
    assert engine.prefix_cache.hits > 0
    assert bool(engine.scheduler.preemptions) == short_of_pages
    all_memory_is_back(engine)


def test_requests_that_fit_into_one_pass_take_their_tokens_together():
    model = tiny(RouterConfig(kind="random"))
    for count, parts in ((4, {"token"}), (5, {"enter", "block", "coda"})):
        engine = Engine(model, config=EngineConfig(max_num_seqs=8, lanes=4))
        prompts, params = draw_requests(count, longest_prompt=1)
        for prompt in prompts:
            engine.add_request(prompt, params[0])
        engine.step()
        assert {"token", "enter", "block", "coda"} & engine.measured.passes.keys() <= parts
        assert parts & engine.measured.passes.keys()
