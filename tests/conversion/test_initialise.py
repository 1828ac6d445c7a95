"""Where the layers of a recursive or MoR initialisation come from."""

import pytest
import torch
from transformers import LlamaConfig

from mor.conversion.initialise import fitting_depth, layer_sources, recursive_init
from mor.conversion.llama import from_llama, llama_config
from mor.model.config import RouterConfig, layout
from mor.model.transformer import Transformer
from tests.small_llama import SIZES, close, initialised, llama, tokens

# METHOD of the paper: shared layer of unrolled layer i, for L layers and R recursions
POOL_INDEX = {
    "cycle": lambda i, L, R: i % (L // R),
    "sequence": lambda i, L, R: i // R,
    "middle_cycle": lambda i, L, R: (i - 1) % ((L - 2) // R) + 1,
    "middle_sequence": lambda i, L, R: (i - 1) // R + 1,
}


CHOSEN = {  # of 8 layers, for two recursions: shared layers 0..7, or 1..6 with own ends
    ("stepwise", "plain"): [0, 2, 5, 7],
    ("lower", "plain"): [0, 1, 2, 3],
    ("upper", "plain"): [4, 5, 6, 7],
    ("stepwise", "middle"): [0, 1, 4, 6, 7],
    ("lower", "middle"): [0, 1, 2, 3, 7],
    ("upper", "middle"): [0, 4, 5, 6, 7],
}


@pytest.mark.parametrize("sharing", POOL_INDEX)
@pytest.mark.parametrize("init", ["stepwise", "average", "lower", "upper"])
def test_every_layer_starts_where_it_should(init, sharing):
    source = from_llama(llama(tie_word_embeddings=False))
    layers = [block.state_dict() for block in source.recursions.shared_blocks]
    made = initialised(source, 2, sharing, init)
    middle = sharing.startswith("middle")
    if init == "average":
        groups = {}
        for i in range(8):
            own = middle and i in (0, 7)
            groups.setdefault(("own", i) if own else POOL_INDEX[sharing](i, 8, 2), []).append(i)
        last = [groups.pop(("own", i)) for i in (0, 7)] if middle else []
        expected = [*last[:1], *(groups[i] for i in sorted(groups)), *last[1:]]
    else:
        expected = [[i] for i in CHOSEN[init, "middle" if middle else "plain"]]
    blocks = made.blocks()
    assert len(blocks) == len(expected) == (5 if middle else 4)
    for block, group in zip(blocks, expected, strict=True):
        for name, weight in block.state_dict().items():
            close(weight, sum(layers[i][name] for i in group) / len(group), atol=1e-7)
    for name in ("embedding", "final_norm", "head"):
        assert torch.equal(getattr(made, name).weight, getattr(source, name).weight)


@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
def test_random_keeps_only_what_is_not_shared(sharing):
    source = from_llama(llama())
    made = initialised(source, 2, sharing, "random", router=RouterConfig(kind="expert_choice"))
    fresh = Transformer(made.config).init_weights(0)
    for name, weight in made.recursions.state_dict().items():
        assert torch.equal(weight, fresh.recursions.state_dict()[name]), name
    drawn = made.recursions.shared_blocks[0].feed_forward.up_proj.weight
    assert abs(drawn.std().item() / SIZES["initializer_range"] - 1) < 0.1
    assert torch.equal(made.embedding.weight, source.embedding.weight)
    assert torch.equal(made.final_norm.weight, source.final_norm.weight)
    if sharing == "middle_cycle":
        for block, i in [(made.prelude[0], 0), (made.coda[0], 7)]:
            own = source.recursions.shared_blocks[i].state_dict()
            assert all(
                torch.equal(weight, own[name]) for name, weight in block.state_dict().items()
            )


def test_routers_start_as_init_weights_makes_them():
    source = from_llama(llama())
    made = initialised(
        source, 3, "middle_cycle", "upper", router=RouterConfig(kind="expert_choice")
    )
    fresh = Transformer(made.config).init_weights(0).recursions.router.state_dict()
    found = made.recursions.router.state_dict()
    assert found.keys() == fresh.keys() and all(
        torch.equal(found[name], fresh[name]) for name in fresh
    )


@pytest.mark.parametrize("sharing", POOL_INDEX)
@pytest.mark.parametrize("init", ["stepwise", "average", "lower", "upper"])
def test_where_all_layers_are_equal_sharing_them_changes_nothing(init, sharing):
    theirs = llama()
    for layer in theirs.model.layers[1:]:
        layer.load_state_dict(theirs.model.layers[0].state_dict())
    source, ids = from_llama(theirs), tokens(2, 40)
    with torch.inference_mode():
        close(initialised(source, 2, sharing, init)(ids).logits_BTV, source(ids).logits_BTV)


@pytest.mark.parametrize(
    ("shared", "source", "expected"),
    [
        (1, 6, [0]),
        (2, 6, [0, 5]),
        (3, 6, [0, 3, 5]),
        (4, 28, [0, 9, 18, 27]),
        (9, 28, [0, 3, 7, 10, 14, 17, 20, 24, 27]),
    ],
)
def test_stepwise_takes_regular_intervals_with_both_ends_and_rounds_halves_up(
    shared, source, expected
):
    config = llama_config(LlamaConfig(**SIZES)).replace(shared_layers=shared, num_recursions=2)
    assert layer_sources(config, source, "stepwise") == [(i,) for i in expected]


@pytest.mark.parametrize("recursions", [2, 3, 4, 5])
@pytest.mark.parametrize("sharing", POOL_INDEX)
@pytest.mark.parametrize("num_layers", [11, 30, 31, 32])
def test_average_uses_every_source_layer_once_at_every_depth(num_layers, sharing, recursions):
    shape = layout(fitting_depth(num_layers, recursions, sharing), recursions, sharing)
    config = llama_config(LlamaConfig(**SIZES)).replace(**shape)
    groups = layer_sources(config, num_layers, "average")
    assert all(groups) and sorted(i for group in groups for i in group) == list(range(num_layers))
    if sharing.endswith("sequence"):
        assert [i for group in groups for i in group] == list(range(num_layers)), (
            "neighbours stay together"
        )


@pytest.mark.parametrize(
    ("num_layers", "recursions", "sharing", "expected"),
    [
        (30, 3, "middle_cycle", 29),
        (30, 2, "middle_cycle", 30),
        (32, 3, "cycle", 33),
        (31, 2, "cycle", 32),
        (24, 4, "middle_cycle", 26),
        (3, 2, "middle_cycle", 4),
        (2, 3, "middle_cycle", 5),
        (7, 1, "middle_cycle", 7),
    ],
)
def test_the_nearest_depth_is_chosen_and_of_two_the_deeper(
    num_layers, recursions, sharing, expected
):
    assert fitting_depth(num_layers, recursions, sharing) == expected
    layout(expected, recursions, sharing)  # it fits


def test_impossible_initialisations_are_refused():
    source = from_llama(llama())
    with pytest.raises(ValueError, match="which has 8"):
        initialised(source, 2, "middle_cycle", "lower", num_layers=18)
    with pytest.raises(ValueError, match="choose from stepwise, average"):
        initialised(source, 2, "cycle", "first")
    with pytest.raises(ValueError, match="dim=24 differs"):
        recursive_init(source, source.config.replace(dim=24))
    with pytest.raises(ValueError, match="replace none"):
        layer_sources(source.config.replace(shared_layers=7, num_recursions=3), 8, "average")
