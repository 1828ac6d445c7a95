"""The models of the demo are trained as recommended."""

import pytest

from mor.training.config import load_config


@pytest.mark.parametrize("part", ["text", "task"])
def test_mor_is_trained_as_recommended(shown, part):
    model = load_config(shown[0] / part / "mor" / "train.json").model
    assert (model.router.kind, model.router.gate, model.router.alpha) == (
        "expert_choice",
        "residual",
        1.0,
    )
    assert model.kv_strategy == "hybrid"
