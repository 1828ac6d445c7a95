"""Compiled layers, where the compiler works."""

import pytest
import torch

from mor.training.compiling import compile_layers
from mor.training.loop import train
from tests.conftest import random_tokens, tiny
from tests.training.small_run import quiet, settings


@pytest.fixture
def backend(monkeypatch):
    """Give the function by which PyTorch compiles."""

    def use(function):
        compile_by = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda f, **settings: compile_by(f, backend=function, **settings)
        )

    torch._dynamo.reset()
    return use


def broken(graph, inputs):
    raise OSError("no compiler was found")


@pytest.mark.parametrize("max_seq_len", [1, 64])
def test_where_compiling_fails_layers_stay_as_they_are(backend, max_seq_len):
    backend(broken)
    model, tokens = tiny(max_seq_len=max_seq_len), random_tokens(2, min(9, max_seq_len))
    expected = model(tokens).logits_BTV
    with pytest.warns(UserWarning, match=r"no compiler was found.*--compile off does not try"):
        compile_layers(model, "float32", needed=False)
    assert not model.is_compiled
    assert torch.equal(model(tokens).logits_BTV, expected)
    assert all(p.grad is None for p in model.parameters())


def test_a_run_that_was_told_to_compile_says_how_to_do_without(backend, squares, tmp_path):
    backend(broken)
    config = settings(squares, tmp_path / "run", compile="on")
    with pytest.raises(ValueError, match=r"no compiler was found.*--compile off does without"):
        train(config, console=quiet())


def test_the_graphs_of_the_trial_are_those_of_training(backend, squares, tmp_path):
    """So that it costs nothing."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    backend(counting)
    model = tiny()
    compile_layers(model, "float32", needed=True)
    tried = len(graphs)
    assert tried > 0 and model.is_compiled
    tokens = random_tokens(3, 20)
    model(tokens, targets_BT=tokens, selection="topk").nll.backward()
    assert len(graphs) == tried


def test_what_is_wrong_with_the_model_itself_is_no_failure_to_compile(backend):
    backend("eager")
    model = tiny()
    model.embedding = torch.nn.Embedding(0, model.config.dim)
    with pytest.raises(RuntimeError, match="index_select"):
        compile_layers(model, "float32", needed=False)
