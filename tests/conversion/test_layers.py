"""The layers of a model: as often as they are stored, and as often as they are applied."""

import pytest

from mor.conversion.layers import count_parameters, unrolled_layers
from tests.conftest import tiny


def test_shared_layers_are_stored_once_and_applied_at_every_recursion():
    model = tiny("fixed", num_recursions=3, sharing="middle_cycle", num_layers=8)
    first, a, b, last = model.blocks()
    assert [id(layer) for layer in unrolled_layers(model)] == [
        id(layer) for layer in (first, a, b, a, b, a, b, last)
    ]


@pytest.mark.parametrize(
    ("router", "settings", "words"),
    [("expert_choice", {}, "tokens skip layers"), ("fixed", {"kv_strategy": "shared"}, "converts")],
)
def test_models_that_no_stack_of_layers_equals_are_refused(router, settings, words):
    with pytest.raises(ValueError, match=words):
        unrolled_layers(tiny(router, **settings))


def test_a_tied_parameter_counts_once():
    tied, untied = (count_parameters(tiny("fixed", tie_embeddings=t)) for t in (True, False))
    assert untied - tied == 37 * 24
