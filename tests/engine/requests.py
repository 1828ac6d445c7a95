"""Random requests, and what must hold when they are served."""

import functools
import random

import torch

from mor.engine import Engine, EngineConfig, SamplingParams
from tests.conftest import tiny


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


KV = ["recursion_wise", "shared", "hybrid", "final"]

POISON = 36
"""The token that makes a poisoned model's states nan, from its place on."""


@functools.cache
def poisoned(router="expert_choice", kv_strategy="recursion_wise"):
    model = tiny(router, kv_strategy=kv_strategy, tie_embeddings=False)
    with torch.no_grad():
        model.embedding.weight[POISON] = float("nan")
    return model
