"""mor costs: the paper's model, and what a recipe trains with."""

import pytest

from mor.cli import main
from mor.model.config import preset
from mor.training.config import TrainConfig, total_flops, training_of
from tests.cli.printed import last_json


def test_costs_of_the_papers_model(capsys):
    three = ["costs", "--preset", "smollm-360m", "--num-recursions", "3", "--json"]
    main([*three, "--recipe", "paper"])
    found = last_json(capsys)
    assert round(found["paper_mflops_per_token"], 1) == 555.6 and found["mean_depth"] == 2.0
    main(three)
    ours = last_json(capsys)
    assert (found["recipe"], ours["recipe"]) == ("paper", "recommended")
    assert (found["kv_strategy"], ours["kv_strategy"]) == ("recursion_wise", "hybrid")
    assert {"params_non_embedding", "train_flops_per_token", "kv_bytes_per_token"} <= found.keys()
    main(["costs", "--preset", "smollm-360m", "--num-recursions", "1"])
    assert "314,635,200" in capsys.readouterr().out


def test_costs_of_the_elastic_recipe_are_those_of_its_steps(capsys):
    flags = ["--preset", "tiny", "--num-recursions", "3", "--recipe", "elastic"]
    main(["costs", *flags, "--context", "64", "--train.batch-size", "4", "--json"])
    found = last_json(capsys)
    model = preset("tiny", num_recursions=3, recipe="elastic")
    shape = dict(seq_len=64, batch_size=4, steps=1000)
    settings = TrainConfig(model=model, **shape, **training_of("elastic", model))
    per_token = total_flops(settings) / (1000 * 4 * 64)
    assert found["train_flops_per_token"] == pytest.approx(per_token, rel=1e-3)
    main(["costs", *flags[:-2], "--context", "64", "--train.batch-size", "4", "--json"])
    routed = last_json(capsys)
    for name in ("train_flops_per_token", "train_activations_gb"):
        assert found[name] > routed[name]
