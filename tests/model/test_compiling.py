"""Compiled functions: whole graphs, and room for those of many models."""

import pytest
import torch

from mor.model.compiling import compiled
from tests.conftest import random_tokens, tiny
from tests.model.test_transformer import gradients


@torch._dynamo.config.patch(recompile_limit=4)
def test_models_of_many_shapes_compile_in_one_process():
    """PyTorch counts the graphs of all of them together, and would stop at a limit."""
    torch._dynamo.reset()
    tokens = random_tokens(2, 30)
    for dim in (8, 12, 16):
        shape = dict(dim=dim, kv_strategy="shared", num_recursions=2, num_layers=4)
        model, plain = tiny(**shape).compile_blocks(backend="eager"), tiny(**shape)
        found, expected = gradients(model, tokens, None), gradients(plain, tokens, None)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_what_breaks_a_graph_is_an_error():
    def breaks(x):
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        compiled(breaks, backend="eager")(torch.ones(2))
