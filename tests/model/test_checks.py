"""Bad input to the model: refused, with how to mend it."""

import pytest
import torch

from tests.conftest import random_tokens, tiny


def test_bad_input_to_the_model_is_refused():
    model = tiny("fixed")
    with pytest.raises(ValueError, match="not be empty"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="hides every token"):
        model(random_tokens(1, 3), mask_BT=torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="choose 'topk' or 'threshold'"):
        model(random_tokens(1, 3), selection="best")


TOKENS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("tokens", "settings", "words"),
    [
        (TOKENS[0], {}, r"shape \(batch, length\).*got \(3,\)"),
        (TOKENS.float(), {}, "int64 or int32, got torch.float32"),
        (TOKENS.bool(), {}, "int64 or int32, got torch.bool"),
        (-TOKENS, {}, r"0\.\.36, got ids from -3 to -1"),
        (TOKENS + 35, {}, r"0\.\.36, got ids from 36 to 38"),
        (TOKENS, dict(mask_BT=torch.tensor([[0.0, 0.0, -1e9]])), "a mask is true"),
        (TOKENS, dict(mask_BT=torch.tensor([[1, 1, 2]])), "also has 2"),
        (TOKENS, dict(mask_BT=torch.ones(1, 4).bool()), r"mask has shape \(1, 4\)"),
        (TOKENS, dict(targets_BT=TOKENS[:, :2]), r"targets have shape \(1, 2\)"),
        (TOKENS, dict(targets_BT=TOKENS.float()), "int64, got torch.float32"),
        (TOKENS, dict(targets_BT=TOKENS - 2), r"targets must lie in 0\.\.36, or be -100"),
        (TOKENS, dict(targets_BT=TOKENS + 35), r"targets must lie in 0\.\.36, or be -100"),
        (TOKENS, dict(max_depth=0), r"whole number in 1\.\.3, got 0"),
        (TOKENS, dict(max_depth=True), r"whole number in 1\.\.3, got True"),
        (TOKENS, dict(max_depth=1.5), r"whole number in 1\.\.3, got 1.5"),
        ([[1, 2, 3]], {}, "tokens must be a tensor, got a list; make one with torch.tensor"),
        (TOKENS, dict(mask_BT=[[1, 1, 1]]), "mask_BT must be a tensor, got a list"),
        (TOKENS, dict(documents_BT=[[1, 1, 1]]), "documents_BT must be a tensor, got a list"),
        (TOKENS, dict(targets_BT=[[1, 1, 1]]), "targets_BT must be a tensor, got a list"),
        (TOKENS, dict(capacities=5), "capacities must be a share for each recursion, got 5"),
        (TOKENS, dict(capacities=torch.tensor(1.0)), "a share for each recursion, got tensor"),
        (TOKENS, dict(capacities="abc"), "capacities"),
    ],
)
def test_tokens_masks_and_targets_that_mean_nothing_are_refused(tokens, settings, words):
    with pytest.raises(ValueError, match=words):
        tiny("expert_choice")(tokens, **settings)


def test_capacities_in_a_list_are_those_in_a_tuple():
    model = tiny("expert_choice")
    found = [
        model(TOKENS, selection="topk", capacities=each).logits_BTV
        for each in ((1, 0.7, 0.4), [1, 0.7, 0.4])
    ]
    assert torch.equal(*found)


def test_an_error_of_a_hook_is_not_taken_for_a_bad_id():
    model = tiny()
    model.embedding.register_forward_hook(lambda module, given, out: out.size(2))
    with pytest.raises(IndexError, match="Dimension out of range"):
        model(TOKENS)


def test_masks_of_numbers_and_ids_of_32_bits_mean_the_same():
    model, tokens = tiny("expert_choice"), random_tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = model(tokens, mask_BT=mask.bool()).logits_BTV
    for same in (mask, mask.float()):
        assert torch.equal(model(tokens.int(), mask_BT=same).logits_BTV, expected)
    targets = tokens.masked_fill(mask == 0, -100)
    assert model(tokens, targets_BT=targets).nll.isfinite()
