"""Passes of tokens at different depths."""

from mor.engine import Engine, EngineConfig, SamplingParams
from mor.model.config import RouterConfig
from tests.conftest import tiny
from tests.engine.requests import draw_requests


def test_tokens_of_different_depths_share_a_pass():
    model = tiny(RouterConfig(kind="random"))
    engine = Engine(model, config=EngineConfig(batching="depth_wise"))
    prompts, _ = draw_requests(16)
    engine.generate(prompts, SamplingParams(max_new_tokens=16, temperature=0))
    passes = engine.measured.tokens["block"] / engine.measured.passes["block"]
    # far fewer passes than tokens times depth
    assert engine.measured.passes["block"] < 16 * 3 and passes > 12
