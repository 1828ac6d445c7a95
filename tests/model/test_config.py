"""Presets, layouts, and settings that contradict each other."""

from dataclasses import replace

import pytest

from mor.model.config import PRESET_NAMES, ModelConfig, RouterConfig, layout, preset


@pytest.mark.parametrize(
    ("recursions", "expected"), [(2, (1, 15, 1)), (3, (1, 10, 1)), (4, (1, 8, 1))]
)
def test_360m_preset_has_the_papers_layouts(recursions, expected):
    config = preset("smollm-360m", num_recursions=recursions)
    assert (config.prelude_layers, config.shared_layers, config.coda_layers) == expected


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset_allows_two_to_four_recursions(name):
    for recursions in (2, 3, 4):
        assert preset(name, num_recursions=recursions, router="expert_choice").family == "mor"


def test_a_recipe_fills_in_what_is_not_given():
    mor, paper = (preset("tiny", num_recursions=3, recipe=r) for r in ("recommended", "paper"))
    assert (mor.router.kind, mor.router.gate, mor.router.gate_scale) == (
        "expert_choice",
        "residual",
        1.0,
    )
    assert (paper.router.kind, paper.router.gate, paper.router.gate_scale) == (
        "expert_choice",
        "paper",
        0.1,
    )
    assert (mor.kv_strategy, paper.kv_strategy) == ("hybrid", "recursion_wise")
    elastic = preset("tiny", num_recursions=3, recipe="elastic")
    assert (elastic.kv_strategy, elastic.router.causal_selection) == ("final", "gain")
    assert elastic.router == replace(mor.router, causal_selection="gain", reads="direction")
    chance = preset("tiny", num_recursions=3, recipe="elastic", router="random")
    assert (chance.kv_strategy, chance.router.gate) == ("final", "residual")
    assert preset("tiny", num_recursions=3, kv_strategy="shared").kv_strategy == "shared"
    assert preset("tiny", num_recursions=3, router="random").router.gate == "residual"
    assert preset("tiny", num_recursions=3, router="token_choice").router.gate == "paper"
    fixed = preset("tiny", num_recursions=3, router="fixed")
    assert (fixed.family, fixed.kv_strategy) == ("recursive", "recursion_wise")
    assert preset("tiny").family == "vanilla"


def test_a_router_config_is_taken_as_it_is():
    router = RouterConfig(kind="random", capacities=(0.5, 0.3, 0.1))
    made = preset("tiny", num_recursions=3, router=router)
    assert made.router == router and made.kv_strategy == "recursion_wise"


def test_impossible_depths_are_refused_with_the_nearest_valid_ones():
    with pytest.raises(ValueError, match="nearest valid: 29 or 32"):
        preset("smollm-135m", num_recursions=3, num_layers=30)
    with pytest.raises(ValueError, match="nearest valid: 9 or 12"):
        layout(10, 3, "cycle")
    with pytest.raises(ValueError, match="nearest valid: 5"):
        layout(2, 3, "middle_cycle")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(router=dict(kind="expert_choise")), "did you mean 'expert_choice'"),
        (dict(numheads=3), "did you mean 'num_heads'"),
        (dict(router=dict(alfa=1.0)), "did you mean 'alpha'"),
        (dict(num_heads=4, num_kv_heads=3), "multiple of num_kv_heads"),
        (dict(head_dim=7), "even"),
        (dict(shared_layers=0), "shared_layers must be at least 1"),
        (dict(prelude_layers=-1), "prelude_layers must be at least 0, got -1"),
        (dict(router=dict(kind="expert_choice")), "needs num_recursions >= 2"),
        (
            dict(num_recursions=2, shared_order="sequence", router=dict(kind="expert_choice")),
            "needs shared_order='cycle'",
        ),
        (
            dict(num_recursions=2, router=dict(kind="expert_choice", capacities=(1.0,))),
            "1 entries for num_recursions=2",
        ),
        (
            dict(num_recursions=2, router=dict(kind="expert_choice", capacities=(0.5, 1.0))),
            "must not grow",
        ),
        (
            dict(num_recursions=2, router=dict(kind="expert_choice", capacities=(1.0, 0.0))),
            r"router.capacities\[1\] must be greater than 0, got 0",
        ),
        (
            dict(
                num_recursions=2,
                kv_strategy="shared",
                router=dict(kind="random", capacities=(0.5, 0.5)),
            ),
            "first capacity must be 1",
        ),
        (
            dict(num_recursions=2, router=dict(kind="expert_choice", score="softmax")),
            "token_choice",
        ),
        (
            dict(num_recursions=2, router=dict(kind="token_choice", score="tanh")),
            "no probabilities",
        ),
        (
            dict(
                num_recursions=2,
                router=dict(kind="token_choice", combination="every", gate="residual"),
            ),
            "no residual form",
        ),
        (
            dict(num_recursions=2, router=dict(kind="random", alpha=0.0)),
            "router.alpha must be greater than 0, got 0",
        ),
    ],
)
def test_wrong_or_contradictory_settings_are_refused_with_help(settings, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_dict(settings)


def test_unknown_preset_or_sharing_names_the_known_ones():
    with pytest.raises(ValueError, match="did you mean 'smollm-360m'"):
        preset("smollm-36m")
    with pytest.raises(ValueError, match="middle_cycle"):
        preset("tiny", num_recursions=2, sharing="cyclic")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "settings",
    [
        dict(router=dict(balancing="none")),
        dict(num_recursions=2, router=dict(kind="token_choice", hierarchical=False)),
        dict(num_recursions=2, kv_strategy="hybrid"),
        dict(kv_strategy="shared"),
        dict(shared_order="sequence"),
        dict(num_recursions=2, router=dict(kind="token_choice", bias_update_rate=0.1)),
    ],
)
def test_a_setting_without_effect_is_a_warning(settings):
    with pytest.warns(UserWarning, match="has no effect"):
        ModelConfig.from_dict(settings)


def test_the_least_depth_is_0_only_where_the_first_recursion_leaves_tokens_out():
    for kind in ("fixed", "token_choice", "expert_choice", "random"):
        assert preset("tiny", num_recursions=3, router=kind).least_depth == 1
    router = RouterConfig(kind="expert_choice", capacities=(0.9, 0.5))
    assert preset("tiny", num_recursions=2, router=router).least_depth == 0


def test_other_capacities_must_fit_as_configured_ones_must():
    config = preset("tiny", num_recursions=3)
    assert config.with_capacities([1.0, 0.9, 0.8]).capacities == (1.0, 0.9, 0.8)
    for capacities, words in (
        ((1.0,), "1 entries for num_recursions=3"),
        ((1.0, 0.2, 0.5), "must not grow"),
        ((0.5, 0.3, 0.1), "first capacity must be 1"),
        ((1.0, 0.5, float("nan")), "finite"),
    ):
        with pytest.raises(ValueError, match=words):
            config.with_capacities(capacities)


def test_dict_round_trip():
    config = preset(
        "tiny",
        num_recursions=3,
        router=RouterConfig(kind="expert_choice", capacities=(1, 0.5, 0.25)),
    )
    assert ModelConfig.from_dict(config.to_dict()) == config
