"""Threshold selection never looks ahead; top-k does, and the test says so."""

import pytest
import torch
from conftest import cases, random_tokens, tiny


@pytest.mark.parametrize("make", cases())
def test_future_tokens_change_no_earlier_logit(make):
    model = make().double()  # kernels differ by length: in fp32 their noise would hide a small leak
    tokens = random_tokens(3, 17)
    with torch.no_grad():
        before = model(tokens)
        for cut in (1, 6, 16):
            changed = tokens.clone()
            changed[:, cut:] = (changed[:, cut:] + 1 + random_tokens(3, 17 - cut, seed=cut, vocab=35)) % 37
            after = model(changed)
            assert torch.equal(before.routing.depth_BT[:, :cut], after.routing.depth_BT[:, :cut])
            assert (before.logits_BTV[:, :cut] - after.logits_BTV[:, :cut]).abs().max() < 1e-9
            assert (before.logits_BTV[:, cut:] - after.logits_BTV[:, cut:]).abs().max() > 1e-3
            shorter = model(tokens[:, :cut])
            assert torch.equal(before.routing.depth_BT[:, :cut], shorter.routing.depth_BT)
            assert (before.logits_BTV[:, :cut] - shorter.logits_BTV).abs().max() < 1e-9


def test_topk_selection_leaks_the_future():
    model = tiny("expert_choice")
    tokens = random_tokens(1, 17)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 5) % 37
    with torch.no_grad():
        leak = model(tokens, selection="topk").logits_BTV - model(changed, selection="topk").logits_BTV
    assert leak[:, :9].abs().max() > 1e-3


def test_topk_cannot_decode():
    from mor.kv_cache import KVCache

    model = tiny("expert_choice")
    with pytest.raises(ValueError, match="threshold"):
        model(random_tokens(1, 4), selection="topk", cache=KVCache(model.config, 1))
