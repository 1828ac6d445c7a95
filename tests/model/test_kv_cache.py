"""The cache: cut back, reordered, and no larger than it must be."""

import pytest
import torch

from mor.model.kv_cache import KVCache
from tests.conftest import cases, random_tokens, tiny


@pytest.mark.parametrize("make", cases("pairs"))
def test_truncating_forgets_exactly_the_later_tokens(make):
    model, tokens = make(), random_tokens(2, 12)
    with torch.no_grad():
        cache, short = KVCache(model.config, 2), KVCache(model.config, 2)
        model(tokens, cache=cache)
        cache.truncate(7)
        model(tokens[:, :7], cache=short)
        assert cache.nbytes == short.nbytes
        a, b = (model(tokens[:, 7:], cache=c).logits_BTV for c in (cache, short))
    assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("make", cases("pairs"))
def test_rows_can_be_reordered_and_repeated(make):
    model, tokens = make(), random_tokens(3, 9)
    order = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        cache = KVCache(model.config, 3)
        model(tokens[:, :6], cache=cache)
        cache.select_rows(order)
        moved = model(tokens[order][:, 6:], cache=cache).logits_BTV
        full = model(tokens[order]).logits_BTV[:, 6:]
    assert (moved - full).abs().max() < 1e-4


def test_shared_strategy_projects_and_stores_nothing_after_the_first_recursion():
    model = tiny("expert_choice", kv_strategy="shared")
    calls = []
    for block in model.recursions.shared_blocks:
        block.attention.k_proj.register_forward_hook(lambda *_: calls.append("k"))
        block.attention.v_proj.register_forward_hook(lambda *_: calls.append("v"))
    cache = KVCache(model.config, 1)
    with torch.no_grad():
        model(random_tokens(1, 9), cache=cache)
    assert sorted(calls) == ["k", "k", "v", "v"]
    assert [len(s.k) for s in cache.streams] == [2, 2, 0, 0]


def test_a_cache_of_another_batch_size_is_refused():
    model = tiny("fixed")
    with pytest.raises(ValueError, match="holds 2 sequences, the batch has 1"):
        model(random_tokens(1, 3), cache=KVCache(model.config, 2))
    with pytest.raises(ValueError, match="at least one sequence"):
        KVCache(model.config, 0)
