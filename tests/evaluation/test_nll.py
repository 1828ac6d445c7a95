"""Evaluation against its definition: the mean over windows of what each token costs, by selection
and depth."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mor.data.stream import Part, TokenData
from mor.evaluation.nll import evaluate, leak
from mor.model.config import RouterConfig
from mor.training.loop import train
from tests.conftest import random_tokens, tiny
from tests.training.small_run import quiet, settings

DATA = TokenData([Part(random_tokens(100).numpy(), np.array([30, 71, 100]))], 3, 250)


def cost_of_each_token(model, *, windows, **settings):
    """Nats, one window at a time, from the logits."""
    stream = DATA.tokens(0, 100)
    found = []
    for i in windows:
        ids = stream[i * 9 : i * 9 + 10]
        logits = model(ids[None, :-1], **settings).logits_BTV[0]
        found.append(F.cross_entropy(logits, ids[1:], reduction="none"))
    return torch.cat(found)


@pytest.mark.parametrize("router", ["fixed", "expert_choice", "token_choice", "random"])
@pytest.mark.parametrize("max_depth", [1, 2, 3])
@torch.inference_mode()
def test_every_figure_is_what_its_definition_gives(router, max_depth):
    model = tiny(router)
    for selection in ("threshold", "topk"):
        found = evaluate(
            model, DATA, seq_len=9, batch_size=4, max_depth=max_depth, selection=selection
        )
        nats = cost_of_each_token(
            model, windows=range(11), max_depth=max_depth, selection=selection
        )
        assert found.tokens == len(nats) == 99 and found.max_depth == max_depth
        assert found.nll == pytest.approx(nats.mean().item(), rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(found.nll))
        assert found.bits_per_byte == pytest.approx(found.nll / math.log(2) * 100 / 250)
        assert found.causal == (selection == "threshold" or router in ("fixed", "token_choice"))
        assert len(found.share_per_recursion) == max_depth and found.share_per_recursion[0] == 1
        assert found.mean_depth == pytest.approx(sum(found.share_per_recursion))


@torch.inference_mode()
def test_a_share_of_the_windows_is_spread_evenly():
    model = tiny()
    nats = cost_of_each_token(model, windows=[0, 2, 5, 8])
    found = evaluate(model, DATA, seq_len=9, batch_size=3, max_windows=4)
    assert found.nll == pytest.approx(nats.mean().item(), rel=1e-5) and found.tokens == 36


def test_the_leak_is_what_topk_gains():
    topk, causal = leak(tiny(RouterConfig(kind="expert_choice", alpha=1.0)), DATA, seq_len=9)
    assert topk.leak_nats == pytest.approx(causal.nll - topk.nll) and abs(topk.leak_nats) > 1e-3
    assert not topk.causal and causal.causal and causal.leak_nats is None


@pytest.mark.gpu
def test_cuda_gives_the_figures_of_the_cpu():
    model = tiny()
    expected = evaluate(model, DATA, seq_len=9)
    assert evaluate(model.cuda(), DATA, seq_len=9).nll == pytest.approx(expected.nll, abs=1e-4)


def test_evaluation_is_causal_unless_asked_and_says_so(squares, tmp_path):
    result = train(settings(squares, tmp_path / "run", steps=20), console=quiet())
    model, validation = result.state.model, result.corpus.validation
    causal = evaluate(model, validation, seq_len=32)
    leaking = evaluate(model, validation, seq_len=32, selection="topk")
    assert causal.causal and not leaking.causal and causal.nll != leaking.nll
    per_byte = causal.nll / math.log(2) * len(validation) / validation.num_bytes
    assert causal.bits_per_byte == pytest.approx(per_byte)
    one_by_one = evaluate(model, validation, seq_len=32, batch_size=1)
    assert one_by_one.nll == pytest.approx(causal.nll, rel=1e-5)
    assert evaluate(model, validation, seq_len=32, max_depth=1).mean_depth == 1
    with pytest.raises(ValueError, match="less than one window"):
        evaluate(model, validation, seq_len=10**6)
