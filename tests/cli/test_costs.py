"""mor costs: the paper's model, and what a recipe trains with."""

import pytest

from mor import checkpoint
from mor.cli import main
from mor.costs.flops import unique_params
from mor.data.tokenizer import byte_tokenizer
from mor.model.config import preset
from mor.training.config import TrainConfig, settings_of, total_flops, training_of
from tests.cli.printed import last_json
from tests.conftest import tiny


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


def test_costs_of_a_checkpoint_are_those_of_its_model_and_run(run, tmp_path, capsys):
    main(["costs", "--checkpoint", str(run / "run"), "--json"])
    found = last_json(capsys)
    settings = settings_of(run / "run")
    model = settings.model
    assert found["params"] == unique_params(model) and found["context"] == model.max_seq_len
    assert "recipe" not in found
    main(["costs", "--checkpoint", str(run / "run"), "--context", str(settings.seq_len), "--json"])
    tokens = settings.steps * settings.batch_size * settings.seq_len
    per_token = total_flops(settings) / tokens
    assert last_json(capsys)["train_flops_per_token"] == pytest.approx(per_token, rel=1e-6)

    with pytest.raises(SystemExit):
        main(["costs", "--checkpoint", str(run / "run"), "--num-recursions", "2"])
    assert "--num-recursions has no effect with --checkpoint" in capsys.readouterr().err


def test_training_adapters_costs_what_is_trained_and_its_memory_is_refused(tmp_path, capsys):
    model = tiny("gain", deepened=True, lora_rank=2, vocab_size=257)
    checkpoint.save(tmp_path / "adapted", model, byte_tokenizer())
    main(["costs", "--checkpoint", str(tmp_path / "adapted"), "--context", "32", "--json"])
    settings = TrainConfig(model=model.config.replace(max_seq_len=32), seq_len=32, steps=1)
    assert settings.trained == "added"
    per_token = total_flops(settings) / (settings.batch_size * 32)
    assert last_json(capsys)["train_flops_per_token"] == pytest.approx(per_token)
    with pytest.raises(SystemExit):
        main(["costs", "--checkpoint", str(tmp_path / "adapted"), "--train.batch-size", "2"])
    assert "leave out --train.batch-size" in capsys.readouterr().err
