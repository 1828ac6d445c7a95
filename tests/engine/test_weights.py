"""Weights for decoding: int8, and products of few rows."""

import pytest
import torch

from mor.engine import Engine, EngineConfig
from mor.engine.weights import FewRowsLinear, for_decoding
from tests.conftest import random_tokens, tiny
from tests.engine.requests import draw_requests


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


def test_a_compiled_model_is_quantised_too():
    tokens = random_tokens(2, 10)
    plain = for_decoding(tiny(), "int8")(tokens).logits_BTV
    compiled = tiny().compile_blocks(backend="eager")
    quantised = for_decoding(compiled, "int8")
    torch.testing.assert_close(quantised(tokens).logits_BTV, plain)
    assert "enter" in vars(compiled.prelude[0]) and "enter" not in vars(quantised.prelude[0])


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
