"""Early exits keep a mean depth, and are measured at every depth."""

import math

import pytest
import torch
import torch.nn.functional as F

from mor import device
from mor.analysis.early_exit import (
    POLICIES,
    all_to_depth,
    confident_exits,
    early_exits,
    oracle_exits,
    random_exits,
)
from mor.data.config import DataConfig
from mor.data.corpus import load_corpus, tokenize
from mor.data.sources import Document
from mor.data.tokenizer import byte_tokenizer
from mor.evaluation.nll import by_hops, evaluate
from mor.model.config import RouterConfig, preset
from mor.model.other_depths import ForcedRouter
from mor.model.transformer import Transformer
from tests.conftest import random_tokens, tiny


def test_exits_keep_the_mean_depth_and_an_oracle_knows_best():
    generator = torch.Generator().manual_seed(0)
    # deeper is better
    nll = torch.rand(4000, 3, generator=generator, dtype=torch.float64).cumsum(1).flip(1)
    sure = (-nll).exp()
    losses = {}
    for name, policy in POLICIES.items():
        depth = policy(nll, sure, 2.0)
        assert depth.min() >= 1 and depth.max() <= 3 and abs(depth.double().mean() - 2.0) < 0.03, (
            name
        )
        losses[name] = nll.gather(1, depth[:, None] - 1).mean()
    assert losses["oracle"] < losses["confidence"] < losses["random"]
    # Where every further recursion hurts, an oracle stays at one.
    assert (oracle_exits(nll.flip(1), sure, 2.0) == 1).all()
    assert torch.equal(confident_exits(nll, sure, 3.0), torch.full((4000,), 3))
    assert torch.equal(random_exits(nll, sure, 2.0), random_exits(-nll, sure + 1, 2.0)), (
        "knows nothing of the tokens"
    )


def test_exits_are_measured_at_every_depth_of_the_model():
    data = load_corpus(DataConfig(path="task:state-tracking")).validation
    config = preset("tiny", vocab_size=15, num_recursions=3, router="fixed")
    model = Transformer(config).init_weights().eval()
    found = early_exits(model, data, 20, 32)
    caps = [evaluate(model, data, seq_len=20, max_windows=32, max_depth=r).nll for r in (1, 2, 3)]
    assert found["fixed"] == pytest.approx(caps, abs=1e-5) and found["mean_depth"] == 2
    assert found["oracle"]["nll"] < min(caps) and found["oracle"]["mean_depth"] <= 2.01
    assert abs(found["confidence"]["mean_depth"] - 2) < 0.05


def test_where_tokens_may_take_no_recursion_that_is_an_exit_too():
    data = load_corpus(DataConfig(path="task:state-tracking")).validation
    router = RouterConfig(kind="random", capacities=(0.5, 0.3, 0.1))
    model = tiny(router, vocab_size=15)
    found = early_exits(model, data, 20, 32)
    batch = data.batch(data.spread(20, 32), 20)
    with torch.no_grad():
        nowhere_RM = torch.zeros(3, batch.tokens_BT.numel(), dtype=torch.bool)
        forced = ForcedRouter(model.router, nowhere_RM)
        logits = model(batch.tokens_BT, router=forced).logits_BTV
        nll = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten())
    assert len(found["fixed"]) == 4 and found["fixed"][0] == pytest.approx(float(nll), abs=1e-5)
    for policy in ("random", "confidence"):
        assert found[policy]["mean_depth"] == pytest.approx(0.9, abs=0.05), policy
    assert found["oracle"]["nll"] < min(found["fixed"]) and found["oracle"]["mean_depth"] < 0.91


def test_exits_are_those_of_the_windows_that_are_scored():
    texts = ["The first text.", "And another one, naïve and longer."]
    data = tokenize([Document(text, text) for text in texts], byte_tokenizer())
    model = tiny("fixed", vocab_size=257)
    for masked in (False, True):
        whole = dict(seq_len=20, max_windows=9, document_mask=masked)
        caps = [evaluate(model, data, max_depth=r, **whole).nll for r in (1, 2, 3)]
        assert early_exits(model, data, **whole)["fixed"] == pytest.approx(caps, abs=1e-5)
    with torch.no_grad():
        model.final_norm.weight[3] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        early_exits(model, data, 20, 9)


@torch.inference_mode()
def test_every_token_goes_as_deep_as_it_is_sent():
    tokens = random_tokens(2, 11)
    chosen = tiny("token_choice")
    for depth in (1, 2, 3):
        for kind in ("fixed", "expert_choice", "random"):
            model = tiny(kind)
            expected = model(tokens, capacities=(1.0,) * 3, max_depth=depth).logits_BTV
            torch.testing.assert_close(
                all_to_depth(model, tokens, depth), expected, atol=1e-4, rtol=1e-4
            )
        sent = all_to_depth(chosen, tokens, depth)
        # it gates nothing
        chosen.router.bias_R[:] = torch.where(torch.arange(3) == depth - 1, 99.0, 0.0)
        expected = chosen(tokens)
        assert (expected.routing.depth_BT == depth).all()
        torch.testing.assert_close(sent, expected.logits_BTV, atol=1e-4, rtol=1e-4)
        chosen.router.bias_R.zero_()


def test_equal_probabilities_are_shared_out_until_the_mean_depth_is_met():
    hard = torch.arange(4000) % 10 < 3
    sure = torch.where(hard[:, None] & (torch.arange(4) < 3), 0.5, 1.0).double()
    nll = -(sure * 0.999).log()
    for mean_depth in (1.5, 2.5, 3.9):
        depth = confident_exits(nll, sure, mean_depth)
        assert depth.double().mean() == pytest.approx(mean_depth, abs=0.001)
        assert (
            depth.min() >= 1
            and depth.max() <= 4
            and torch.equal(depth, confident_exits(nll, sure, mean_depth))
        )
    assert (confident_exits(nll, sure, 2.5)[hard] == 4).all(), (
        "sure tokens go deeper only when all others do"
    )
    assert oracle_exits(nll, sure, 1.5).double().mean() == pytest.approx(1.5, abs=0.001)


@pytest.mark.parametrize(
    "measure", [lambda *a: early_exits(*a), lambda *a: by_hops(*a)], ids=["exits", "hops"]
)
def test_batches_go_where_the_model_is(measure, monkeypatch):
    def forward(self, tokens_BT, **settings):
        raise LookupError(tokens_BT.device.type)

    monkeypatch.setattr(Transformer, "forward", forward)
    data = load_corpus(DataConfig(path="task:state-tracking")).validation
    with pytest.raises(LookupError, match="meta"):
        measure(tiny(vocab_size=15).to("meta"), data, 16, 4)


def test_exits_are_measured_in_bfloat16_where_that_is_the_devices_way(monkeypatch):
    data = load_corpus(DataConfig(path="task:state-tracking")).validation
    model = tiny(vocab_size=15)
    exact = early_exits(model, data, 16, 8)["fixed"]
    monkeypatch.setattr(device, "is_low", lambda *_: True)
    low = early_exits(model, data, 16, 8)["fixed"]
    assert low != exact and low == pytest.approx(exact, rel=0.05)


@pytest.mark.gpu
def test_cuda_gives_the_exits_and_hops_of_the_cpu(monkeypatch):
    monkeypatch.setattr(device, "is_low", lambda *_: False)
    data = load_corpus(DataConfig(path="task:state-tracking")).validation
    for kind in ("expert_choice", "token_choice"):
        model = tiny(kind, vocab_size=15)
        found, hops = early_exits(model, data, 16, 32), by_hops(model, data, 16, 32)
        there, hops_there = early_exits(model.cuda(), data, 16, 32), by_hops(model, data, 16, 32)
        assert there["fixed"] == pytest.approx(found["fixed"], abs=1e-4)
        assert there["oracle"]["nll"] == pytest.approx(found["oracle"]["nll"], abs=1e-3)
        assert hops_there["answers_right"] == pytest.approx(hops["answers_right"], abs=0.01)
