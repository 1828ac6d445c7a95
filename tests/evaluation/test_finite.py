"""What is not finite is named: where it was met, and which weight it comes from."""

import math

import pytest
import torch

from mor.evaluation.finite import require_finite, values_of
from tests.conftest import random_tokens, tiny


@torch.no_grad()
def broken(name, value):
    model = tiny()
    weight = dict(model.named_parameters())[name]
    weight.view(-1)[0] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["final_norm.weight", "recursions.router.nets.1.weight"])
@torch.no_grad()
def test_place_and_weight_are_named(name, value):
    model = broken(name, value)
    tokens_BT = random_tokens(2, 9)
    for output in (model(tokens_BT), model(tokens_BT, targets_BT=tokens_BT)):
        with pytest.raises(ValueError, match=rf"\(in window 3\): its weight {name} holds some"):
            require_finite(model, values_of(output), "in window 3")


@torch.no_grad()
def test_a_model_of_finite_weights_passes_and_overflow_is_told_from_broken_weights():
    model = tiny()
    require_finite(model, values_of(model(random_tokens(2, 9))), "in window 1")
    with pytest.raises(ValueError, match=r"its weights are all finite"):
        require_finite(model, [None, torch.tensor([1.0, math.inf])], "in window 1")
