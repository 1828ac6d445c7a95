"""Settings of a command come from a file and from flags; mistakes in either are named."""

import re
from pathlib import Path

import pytest

from mor.cli import main
from mor.cli.train import Train
from mor.studies.study import load_study, main_runs


def test_a_broken_config_file_is_a_readable_error(tmp_path, capsys):
    (tmp_path / "a.toml").write_text("stepps = 3\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path / "a.toml")])
    assert "did you mean 'steps'" in capsys.readouterr().err


def test_a_config_file_is_named_with_what_is_wrong_in_it(tmp_path, capsys):
    for content, words in (
        ("steps = 3\nseed = = 4\n", "line 2"),
        ("[model.router]\nalpha = -1\n", "model.router.alpha must be greater than 0, got -1"),
        ("steps = true\n", "steps must be a whole number, got True"),
    ):
        (tmp_path / "a.toml").write_text(content)
        with pytest.raises(SystemExit):
            main(["train", "--config", str(tmp_path / "a.toml")])
        printed = capsys.readouterr().err
        assert f"{tmp_path / 'a.toml'}: " in printed and words in printed


def test_flags_win_over_the_model_of_a_file_also_where_they_are_the_defaults(tmp_path):
    (tmp_path / "a.toml").write_text("steps = 3\n[model]\ndim = 32\nnum_heads = 3\n")
    start = ["--config", str(tmp_path / "a.toml")]
    assert Train.read(start, "mor train").settings.model.dim == 32
    assert Train.read([*start, "--seed", "1"], "mor train").settings.model.dim == 32
    with pytest.warns(UserWarning, match="--preset takes the place of model in"):
        chosen = Train.read([*start, "--preset", "mini", "--steps", "4"], "mor train").settings
    assert chosen.model.dim == 192 and chosen.steps == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --num-recursions 2 --model.num-recursions 4", "--num-recursions 2 and .* is 4"),
        ("train --router random --model.router.kind position", "--router random and .* position"),
        ("train --kv-strategy shared --model.kv-strategy hybrid", "--kv-strategy shared and"),
        ("train --num-layers 8 --model.coda-layers 3", "--num-layers 8 and .* it is 10"),
        ("train --num-recursions 1 --kv-strategy hybrid", "--kv-strategy has no effect with one"),
        ("costs --num-recursions 1 --kv-strategy shared", "--kv-strategy has no effect with one"),
        (
            "train --num-recursions 1 --recipe paper",
            "--recipe has no effect on 0.8x1.0 with router",
        ),
        ("train --num-recursions 1 --recipe elastic", "--recipe has no effect on 0.8x1.0 with rou"),
        ("train --router token_choice --recipe elastic", "full_depth_share needs a router with ca"),
        ("train --router token_choice --recipe paper --kv-strategy shared", "--recipe has no eff"),
        ("train --model.router.kind fixed --model.router.alpha .5", "--model.router.alpha has no "),
        ("train --router fixed --model.kv-strategy hybrid", "--model.kv-strategy has no effect wi"),
        ("train --model.router.balancing loss", "--model.router.balancing has no effect with rout"),
        ("train --steps 3 --flops 1e9", "--steps has no effect with flops"),
        ("train --optim.schedule cosine --optim.cooldown 0.1", "--optim.cooldown has no effect"),
        ("train --parallel fsdp", "--parallel has no effect without torchrun"),
        ("train --data.path task:state-tracking --data.vocab-size 9", "leave out data.vocab_size"),
        ("train --data.tokenizer bytes --data.vocab-size 9", "effect with the tokenizer 'bytes'"),
        ("train --data.validation-path a --data.validation-share 0.1", "with a validation_path"),
        ("bench decode --checkpoint a --baseline b --num-layers 3", "effect with --checkpoint"),
        ("costs --train.ranks 2", "--train.ranks has no effect without --train.batch-size"),
        ("generate a --prompt x --temperature 0 --seed 1", "effect with --temperature 0"),
        ("generate a --prompt x --json --show-depth", "--show-depth has no effect with --json"),
        ("report . --seq-len 3", "--seq-len has no effect because . is no run"),
        ("report . --no-analyse --data x", "--data has no effect with --no-analyse"),
        ("sweep --fit paper --jobs 2 --threads 2", "--jobs, --threads have no effect with --fit"),
        ("sweep --fit paper x.toml", "--fit runs no study: leave out x.toml"),
        ("sweep x.toml --gpus 1 --jobs 2", "--jobs has no effect with --gpus"),
        ("sweep x.toml --hours 2", "--hours has no effect without --cluster"),
        ("sweep x.toml --report --seeds 1", "--seeds has no effect with --report"),
        ("data prepare a --out b --subset c", "--subset has no effect without a hub:OWNER/NAME"),
        ("data prepare a --out b --tokenizer bytes --vocab-size 9", "effect with --tokenizer"),
        ("eval a --shots 2", "--shots has no effect without --tasks"),
        ("eval a --text-field b", "--text-field has no effect without --data"),
        ("eval a --tasks piqa --max-windows 2", "--max-windows has no effect with --tasks"),
    ],
)
def test_flags_that_contradict_or_do_nothing_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(words, printed) and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        ("--model.router.kind fixed", ("fixed", "paper", None, "recursion_wise")),
        ("--model.router.kind random", ("random", "residual", 1.0, "hybrid")),
        ("--model.router.kind token_choice", ("token_choice", "paper", None, "hybrid")),
        ("--router random --recipe paper", ("random", "paper", None, "recursion_wise")),
        ("--router random --recipe elastic", ("random", "residual", 1.0, "final")),
        ("--num-recursions 1", ("fixed", "paper", None, "recursion_wise")),
    ],
)
def test_what_a_recipe_sets_is_that_of_the_router_and_nobody_is_blamed(flags, chosen, recwarn):
    model = Train.read(flags.split(), "mor train").settings.model
    kind, gate, alpha, kv_strategy = chosen
    assert (model.router.kind, model.router.gate, model.router.alpha) == (kind, gate, alpha)
    assert model.kv_strategy.startswith(kv_strategy) and not recwarn.list


def test_the_elastic_recipe_is_trained_as_its_study_trains_it(tmp_path):
    def settings(*flags):
        found = Train.read(["--num-recursions", "4", *flags], "mor train").settings
        return (found.full_depth_share, found.exit_share, found.exit_weight), found.model

    studied = main_runs(load_study(Path("studies/elastic-direction.toml")), tmp_path, {})[0]
    config = next(run.config for run in studied if run.variant == "elastic")
    shares, model = settings("--recipe", "elastic")
    assert shares == (config.full_depth_share, config.exit_share, config.exit_weight)
    assert (model.router, model.kv_strategy) == (config.model.router, config.model.kv_strategy)
    assert settings("--recipe", "elastic", "--exit-weight", "0.1")[0] == (*shares[:2], 0.1)
    file = tmp_path / "a.toml"
    file.write_text("exit_share = 0.5\n")
    assert settings("--recipe", "elastic", "--config", str(file))[0] == (0.5, 0.5, 0.3)
    assert settings()[0] == (0.0, 0.0, 0.1)


def test_a_setting_of_a_file_without_effect_is_one_warning(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("[model]\nnum_recursions = 2\n[model.router]\nalpha = 0.5\n")
    with pytest.warns(UserWarning) as said:
        Train.read(["--config", str(file)], "mor train")
    named = f"model.router.alpha in {file} has no effect with router.kind='fixed'"
    assert [str(warning.message) for warning in said] == [named]


def test_a_file_and_flags_that_contradict_it(tmp_path, capsys):
    file = tmp_path / "a.toml"
    for content, flags, words in (
        ("steps = 3\nflops = 1e9\n", (), "steps and flops both say how long"),
        ("flops = 1e9\n", ("--steps", "3"), "--steps has no effect with flops"),
        ("[model]\ndim = 32\n", ("--num-recursions", "2"), "refine it with flags such as --model"),
    ):
        file.write_text(content)
        with pytest.raises(SystemExit):
            main(["train", "--config", str(file), *flags])
        assert words in capsys.readouterr().err
    file.write_text("steps = 3\n[model]\ndim = 32\n")
    with pytest.warns(UserWarning) as said:
        Train.read(["--config", str(file), "--preset", "mini", "--flops", "1e9"], "mor train")
    assert [str(w.message) for w in said if w.category is UserWarning][:2] == [
        f"--preset takes the place of model in {file}",
        f"steps in {file} has no effect with flops, which decide how many there are",
    ]
