"""The cache: cut back, reordered, and no larger than it must be."""

import copy
import pickle

import pytest
import torch

from mor.model.kv_cache import KVCache
from tests.conftest import cases, random_tokens, tiny


@pytest.mark.parametrize("make", cases("pairs", with_final=True))
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


@pytest.mark.parametrize("make", cases("pairs", with_final=True))
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


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (dict(kv_strategy="hybrid"), "kv_strategy"),
        (dict(num_recursions=2), "num_recursions"),
        (dict(num_recursions=3, num_layers=5), "shared_layers"),
    ],
)
def test_a_cache_of_another_model_is_refused(choices, words):
    model, other = tiny("expert_choice"), tiny("expert_choice", **choices)
    with pytest.raises(ValueError, match=f"other settings .*{words}"):
        model(random_tokens(1, 3), cache=KVCache(other.config, 1))


def test_a_cache_of_another_precision_or_place_is_refused():
    model, tokens = tiny("expert_choice"), random_tokens(1, 3)
    for where in (dict(dtype=torch.bfloat16), dict(device="meta")):
        with pytest.raises(ValueError, match=r"the model on cpu in torch\.float32"):
            model(tokens, cache=KVCache(model.config, 1, **where))


def test_numbers_that_would_lose_tokens_or_rows_are_refused():
    cache = KVCache(tiny("fixed").config, 2)
    for length in (-1, torch.tensor([0, -2])):
        with pytest.raises(ValueError, match="0 tokens or more"):
            cache.truncate(length)
    with pytest.raises(ValueError, match="numbers of rows"):
        cache.select_rows(torch.tensor([True, False]))


def test_copies_and_pickles_go_on_as_the_cache_does_and_leave_it_alone():
    model, tokens = tiny("expert_choice", kv_strategy="hybrid"), random_tokens(2, 9)
    cache = KVCache(model.config, 2)
    model(tokens[:, :6], cache=cache)  # with a graph, which copies leave behind
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        found = model(tokens[:, 6:], cache=other).logits_BTV
        torch.testing.assert_close(found, model(tokens).logits_BTV[:, 6:], atol=1e-5, rtol=1e-5)
        assert other.length.tolist() == [9, 9] and cache.length.tolist() == [6, 6]


def test_a_cache_may_be_written_under_autocast():
    model, tokens = tiny("expert_choice", kv_strategy="hybrid"), random_tokens(2, 9)
    cache = KVCache(model.config, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(tokens[:, :6], cache=cache)
        found = model(tokens[:, 6:], cache=cache).logits_BTV
    expected = model(tokens).logits_BTV[:, 6:]
    assert (found - expected).norm() < 0.1 * expected.norm()
