"""Threshold selection never looks ahead; top-k does, and the test says so."""

import pytest
import torch

from tests.conftest import cases, random_tokens, tiny


# Kernels differ by length, so fp32 shows their noise; fp64 shows that nothing smaller hides behind
# it.
@pytest.mark.parametrize(
    ("make", "dtype", "noise"),
    [
        pytest.param(*case.values, dtype, noise, marks=case.marks, id=f"{case.id}-{dtype}")
        for quick, dtype, noise in (("singles", torch.float32, 1e-6), ("all", torch.float64, 1e-14))
        for case in cases(quick, with_final=True)
    ],
)
def test_future_tokens_change_no_earlier_logit(make, dtype, noise):
    model = make().to(dtype)
    tokens = random_tokens(3, 17)
    with torch.no_grad():
        before = model(tokens)
        noise = noise * before.logits_BTV.abs().max()
        for cut in (1, 6, 16):
            changed = tokens.clone()
            changed[:, cut:] = (
                changed[:, cut:] + 1 + random_tokens(3, 17 - cut, seed=cut, vocab=35)
            ) % 37
            after, shorter = model(changed), model(tokens[:, :cut])
            for other in (after, shorter):
                assert torch.equal(
                    before.routing.depth_BT[:, :cut], other.routing.depth_BT[:, :cut]
                )
                assert (before.logits_BTV[:, :cut] - other.logits_BTV[:, :cut]).abs().max() <= noise
            assert (before.logits_BTV[:, cut:] - after.logits_BTV[:, cut:]).abs().max() > 1e-3


def test_topk_selection_leaks_the_future():
    model = tiny("expert_choice")
    tokens = random_tokens(1, 17)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 5) % 37
    with torch.no_grad():
        leak = (
            model(tokens, selection="topk").logits_BTV - model(changed, selection="topk").logits_BTV
        )
    assert leak[:, :9].abs().max() > 1e-3


def test_topk_cannot_decode():
    from mor.model.kv_cache import KVCache

    model = tiny("expert_choice")
    with pytest.raises(ValueError, match="threshold"):
        model(random_tokens(1, 4), selection="topk", cache=KVCache(model.config, 1))
