"""Depth budgets over HTTP: what is asked for is what is spent, and what the answer says."""

import functools

import pytest

from mor.engine import EngineConfig
from mor.evaluation.calibrate import calibrate
from mor.generation import SamplingParams, generate
from tests.budgets import text
from tests.conftest import random_tokens, tiny
from tests.server.served import Held, parts, running

DEEPEST = 5


@functools.cache
def model(kind):
    made = tiny(kind, vocab_size=259, max_seq_len=128)
    if kind == "expert_choice":
        calibrate(made, text(1200), seq_len=60, deepest=DEEPEST)
    return made


@pytest.fixture(scope="module", params=["expert_choice", "random"])
def served(request):
    made = model(request.param)
    settings = EngineConfig(max_num_seqs=2, kv_cache_memory=1 << 21, deepest=DEEPEST)
    with running(lambda: Held(made, parts()[1], settings)) as server, server.client() as client:
        yield made, client


def ask(client, ids, **wish):
    body = {"prompt": ids, "max_tokens": 8, "temperature": 0, "ignore_eos": True} | wish
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    return [usage[f"{kind}_tokens_details"]["mean_depth"] for kind in ("prompt", "completion")]


def test_a_depth_is_spent_and_told(served):
    made, client = served
    ids = random_tokens(100, seed=3).tolist()
    for depth in (1.3, 2.2, 3.5):
        prompt, answer = ask(client, ids, depth=depth)
        assert prompt == pytest.approx(depth, rel=0.15)
        params = SamplingParams(max_new_tokens=8, temperature=0)
        depths = generate(made, [ids], params, depth=depth)[0].depths
        assert prompt == pytest.approx(sum(depths[:100]) / 100)
        assert answer == pytest.approx(sum(depths[99:107]) / 8)


def test_efforts_are_depths_between_the_least_and_the_most(served):
    _, client = served
    ids = random_tokens(100, seed=4).tolist()
    depths = client.get("/v1/models").json()["data"][0]["mor"]["depths"]
    assert depths["min"] == 1 and depths["max"] > 3
    spent = [ask(client, ids, reasoning_effort=e)[0] for e in ("none", "low", "medium", "high")]
    assert spent[0] == 1 and spent[3] == pytest.approx(depths["max"], rel=0.05)
    step = (depths["max"] - 1) / 3
    assert spent[1:3] == pytest.approx([1 + step, 1 + 2 * step], rel=0.15)
    refused = client.post("/v1/completions", json={"prompt": ids, "depth": 9})
    assert refused.status_code == 400 and "cannot be had" in refused.text
