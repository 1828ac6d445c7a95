"""The command line, as a person calls it."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

import mor
from mor.cli import main
from mor.cli.flags import flags
from mor.cli.main import COMMANDS
from mor.cli.train import USUAL, Train, header
from mor.training.config import TrainConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "a.jsonl").write_text(
        "".join(
            json.dumps({"text": f"The square of {i} is {i * i}. " * 6}) + "\n" for i in range(120)
        )
    )
    config = folder / "run.toml"
    config.write_text(
        f'steps = 6\nbatch_size = 4\nseq_len = 32\n[data]\npath = "{folder}/a.jsonl"\nvocab_size = '
        "300\n"
        "[model]\nnum_recursions = 2\nprelude_layers = 1\nshared_layers = 1\ncoda_layers = 1\ndim "
        "= 32\n"
        "num_heads = 2\nnum_kv_heads = 1\nhead_dim = 16\nffn_dim = 64\n[model.router]\nkind = "
        '"expert_choice"\n'
    )
    main(
        [
            "train",
            "--config",
            str(config),
            "--out",
            str(folder / "run"),
            "--steps",
            "8",
            "--model.router.alpha",
            "0.2",
        ]
    )
    return folder


def last_json(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_train_reads_toml_and_flags_win(run):
    kept = json.loads((run / "run" / "train.json").read_text())
    assert kept["steps"] == 8 and kept["seq_len"] == 32 and kept["model"]["router"]["alpha"] == 0.2
    assert (run / "run" / "checkpoints" / "step-00000008" / "model.safetensors").is_file()


def test_train_takes_a_preset_and_a_router(tmp_path, run):
    main(
        [
            "train",
            "--preset",
            "tiny",
            "--num-recursions",
            "3",
            "--router",
            "token_choice",
            "--out",
            str(tmp_path / "r"),
            "--data.path",
            str(run / "a.jsonl"),
            "--data.tokenizer",
            "bytes",
            "--steps",
            "1",
            "--batch-size",
            "2",
            "--seq-len",
            "16",
        ]
    )
    kept = json.loads((tmp_path / "r" / "train.json").read_text())["model"]
    assert (kept["num_recursions"], kept["router"]["kind"], kept["dim"]) == (3, "token_choice", 64)
    assert kept["vocab_size"] == 257


def test_a_run_that_was_moved_can_be_resumed_where_it_is_now(run, tmp_path, capsys):
    shutil.copytree(run / "run", tmp_path / "moved")
    before = (run / "run" / "metrics.jsonl").read_bytes()
    main(["train", "--resume", "--out", str(tmp_path / "moved")])
    assert str(tmp_path / "moved") in capsys.readouterr().out.replace("\n", "")
    assert (run / "run" / "metrics.jsonl").read_bytes() == before


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


def test_eval_prints_json_by_depth_and_labels_topk(run, capsys):
    main(["eval", str(run / "run"), "--json"])
    assert last_json(capsys)["causal"] is True
    main(["eval", str(run / "run"), "--routing", "topk", "--json"])
    topk, causal = last_json(capsys)
    assert topk["causal"] is False and causal["causal"] is True
    assert (
        topk["leak_nats"] == pytest.approx(causal["nll"] - topk["nll"])
        and causal["leak_nats"] is None
    )
    assert causal["perplexity"] == pytest.approx(math.exp(causal["nll"]))
    main(["eval", str(run / "run"), "--routing", "topk"])
    shown = capsys.readouterr().out
    assert "topk, non-causal" in shown and f"{causal['nll']:.4f}" in shown and "…" not in shown
    main(["eval", str(run / "run"), "--data", str(run / "a.jsonl"), "--by-depth", "--json"])
    assert [row["max_depth"] for row in last_json(capsys)] == [1, 2]


def test_generate_streams_or_shows_depths(run, capsys):
    common = ["generate", str(run / "run"), "--prompt", "The square", "--max-new-tokens", "12"]
    main(common)
    streamed = capsys.readouterr().out
    main([*common, "--json"])
    found = last_json(capsys)
    assert streamed == "The square" + found["text"] + "\n"
    assert set(found["depths"]) <= {1, 2} and found["mean_depth"] == sum(found["depths"]) / len(
        found["depths"]
    )
    main([*common, "--show-depth"])
    shown = capsys.readouterr().out
    assert "depth" in shown and "mean depth" in shown and "¹" in shown, (
        "without colours depths are digits"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["costs", "--preset", "smollm-36m"], "did you mean 'smollm-360m'"),
        (
            ["costs", "--preset", "tiny", "--num-recursions", "3", "--num-layers", "9"],
            "nearest valid: 8 or 11",
        ),
        (["eval", "nowhere"], "neither a checkpoint"),
        (["train", "--branch-from", "x"], "go together"),
        (
            ["train", "--branch-from", "x", "--cooldown-steps", "3", "--optim.lr", "1"],
            "leave out --optim.lr",
        ),
        (["train", "--branch-from", "x", "--cooldown-steps", "3"], "neither a checkpoint"),
        (["generate", "nowhere", "--prompt", "x"], "neither a checkpoint"),
        (["convert", "nowhere", "out", "--to", "remote-code"], "neither a checkpoint"),
        (
            ["convert", "nowhere", "out", "--to", "remote-code", "--init", "lower"],
            "leave out --init",
        ),
        (["train", "--config", "nowhere.toml"], "nowhere.toml"),
        (["train", "--resume", "--out", "nowhere"], "no run to resume"),
        (["train", "--resume", "--out", "nowhere", "--steps", "9"], "leave out --steps"),
        (["train", "--data.path", "nowhere.txt", "--out", "never"], "not a file"),
    ],
)
def test_mistakes_end_in_one_line_and_no_traceback(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert (
        printed.err.startswith("error: ") and words in printed.err and printed.err.count("\n") == 1
    )
    assert not (tmp_path / "never").exists()


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
    chosen = Train.read([*start, "--preset", "mini", "--steps", "4"], "mor train").settings
    assert chosen.model.dim == 192 and chosen.steps == 4


def test_the_overview_names_every_command_and_loads_nothing(capsys):
    main([])
    shown = capsys.readouterr().out
    main(["--help"])
    assert capsys.readouterr().out == shown
    assert all(f"  {name} " in shown for name in COMMANDS)
    main(["--version"])
    assert capsys.readouterr().out == f"mor {mor.__version__}\n"
    code = (
        "import sys; from mor.cli import main; main([]); main(['--version']); "
        "print(sorted({'torch', 'tyro', 'pydantic', 'rich', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_of_a_command_does_not_load_torch():
    code = """
import sys
from mor.cli import main
from mor.cli.main import COMMANDS
for name in COMMANDS:
    if name == "bench":  # its settings lie beside what measures
        continue
    try:
        main([name, "--help"])
    except SystemExit as stopped:
        assert stopped.code in (0, None), name
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: mor {name}" in done.stdout for name in COMMANDS if name != "bench")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "mor has no command 'trian' (did you mean 'train'?)"),
        (["--hepl"], "mor has no command '--hepl'"),
        (["costs", "--num-recursion", "2"], "--num-recursions"),
        (["train", "--stepps", "3"], "--steps"),
        (["report", "x", "--max-windows", "0"], "max_windows must be at least 1, got 0"),
    ],
)
def test_a_misspelt_command_or_flag_gets_a_suggestion(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["presets"], ["costs", "--json"]])
def test_a_closed_pipe_is_no_mistake(arguments):
    reader, writer = os.pipe()
    os.close(reader)  # as `mor ... | head` after its last line
    command = [sys.executable, "-m", "mor", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == "" and done.returncode == 1


def test_ctrl_c_says_so(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mor.cli.presets.Presets.run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["presets"])
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_help_for_training_shows_the_usual_flags_first_and_every_other_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 80 and max(map(len, shown.splitlines())) <= 80
    names = ["--" + each.name.replace("_", "-") for each in flags(Train())]
    assert [name for name in names if name not in shown.split()] == []
    usual = ["--" + name.replace("_", "-") for name in USUAL]
    explained = [line.split()[0] for line in shown.splitlines() if line.startswith("--")]
    assert explained == usual
    assert shown.index("Peak learning rate") < shown.index("--model.dim")
    assert "Peak learning rate. (0.003)" in shown and "expert_choice, token_choice" in shown
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    everything = capsys.readouterr().out
    assert all(name in everything for name in names)


def test_training_says_first_what_it_will_do(run, capsys):
    main(["train", "--resume", "--out", str(run / "run")])
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("mor: ") and "1+1x2+1" in first and str(run / "a.jsonl") in first
    assert "8 steps × 128 tokens = 1,024 tokens" in first
    assert "Python's own documentation" in header(TrainConfig())
    one, two = (header(replace(TrainConfig(), steps=steps)) for steps in (100, 200))
    assert float(two.split()[-3]) == pytest.approx(2 * float(one.split()[-3]), rel=1e-2)


def test_bench_decode(run, capsys):
    short = ["--rounds", "1", "--seconds", "0.05", "--batches", "2", "--lengths.mean", "6"]
    main(
        [
            "bench",
            "decode",
            "--preset",
            "tiny",
            "--num-layers",
            "6",
            "--recursions",
            "2",
            *short,
            "--json",
        ]
    )
    found = last_json(capsys)
    assert [row["model"] for row in found["rows"]] == ["vanilla", "mor-2"] * 2
    assert {"tokens_per_s", "speedup", "limit", "mean_depth", "block_only_speedup"} <= found[
        "rows"
    ][1].keys()
    assert found["machine"]["threads"] >= 1
    main(
        [
            "bench",
            "decode",
            "--checkpoint",
            str(run / "run"),
            "--baseline",
            str(run / "run"),
            *short,
        ]
    )
    shown = capsys.readouterr().out
    assert "speedup" in shown and max(map(len, shown.splitlines())) <= 80
    with pytest.raises(SystemExit):
        main(["bench", "decode", "--checkpoint", str(run / "run")])
    assert "go together" in capsys.readouterr().err


def test_explaining_does_not_load_what_takes_a_second_to_import(run, tmp_path):
    code = (
        "import sys; from mor.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch._dynamo', 'torch.distributed.checkpoint', 'sympy', 'transformers'} & "
        "set(sys.modules)))"
    )
    command = [
        "explain",
        str(run / "run"),
        "--text",
        "The square of 3 is",
        "--out",
        str(tmp_path / "page.html"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    assert (tmp_path / "page.html").is_file() and done.stdout.splitlines()[-1] == "[]"
