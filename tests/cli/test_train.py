"""mor train: settings of files and flags, a moved run, and what it will do."""

import json
import shutil
import signal
from dataclasses import replace

import pytest

import mor
from mor.cli import main
from mor.cli.train import Train, header
from mor.training import loop
from mor.training.config import TrainConfig
from tests.cli.printed import found_json


def test_train_reads_toml_and_flags_win(run):
    kept = json.loads((run / "run" / "train.json").read_text())
    assert kept["steps"] == 8 and kept["seq_len"] == 32 and kept["model"]["router"]["alpha"] == 0.2
    assert (run / "run" / "checkpoints" / "step-00000008" / "model.safetensors").is_file()


def test_a_run_that_was_moved_can_be_resumed_where_it_is_now(run, tmp_path, capsys):
    shutil.copytree(run / "run", tmp_path / "moved")
    before = (run / "run" / "metrics.jsonl").read_bytes()
    main(["train", "--resume", "--out", str(tmp_path / "moved")])
    assert str(tmp_path / "moved") in capsys.readouterr().out.replace("\n", "")
    assert (run / "run" / "metrics.jsonl").read_bytes() == before


def test_training_says_first_what_it_will_do(run, capsys):
    main(["train", "--resume", "--out", str(run / "run")])
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("mor: ") and "1+1x2+1" in first and str(run / "a.jsonl") in first
    assert "8 steps × 128 tokens = 1,024 tokens" in first
    assert "Python's own documentation" in header(TrainConfig())
    one, two = (header(replace(TrainConfig(), steps=steps)) for steps in (100, 200))
    assert float(two.split()[-3]) == pytest.approx(2 * float(one.split()[-3]), rel=1e-2)


def test_the_first_line_comes_when_all_is_checked_and_counts_what_is_there(run, tmp_path, capsys):
    shutil.copytree(run / "run", tmp_path / "run", symlinks=True)
    main(["info", str(tmp_path / "run"), "--json"])
    params = json.loads(capsys.readouterr().out)["model"]["params"]
    resume = ["train", "--resume", "--out", str(tmp_path / "run")]
    main(resume)
    assert capsys.readouterr().out.startswith(f"mor: {params:,} parameters, ")
    kept = json.loads((tmp_path / "run" / "train.json").read_text())
    kept["data"]["path"] = str(tmp_path / "moved.jsonl")
    (tmp_path / "run" / "train.json").write_text(json.dumps(kept))
    common = ["train", "--config", str(run / "run.toml")]
    for wrong in (
        resume,
        [*common, "--out", str(run / "run")],
        [*common, "--out", str(tmp_path / "a"), "--device", "nonsense"],
        [*common, "--out", str(tmp_path / "a"), "--data.path", str(tmp_path / "none.jsonl")],
        [*common, "--out", str(tmp_path / "a"), "--branch-from", str(tmp_path)],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        said = capsys.readouterr()
        assert stopped.value.code == 2 and said.out == "" and said.err.count("\n") == 1


def test_a_run_whose_settings_file_is_missing_is_resumed_by_its_checkpoint(run, tmp_path, capsys):
    shutil.copytree(run / "run", tmp_path / "run", symlinks=True)
    file = tmp_path / "run" / "train.json"
    before = json.loads(file.read_text())
    file.unlink()
    main(["train", "--resume", "--out", str(tmp_path / "run")])
    assert "is finished: it has taken all of its 8 steps" in capsys.readouterr().out
    assert json.loads(file.read_text()) == before | {"out": str(tmp_path / "run")}
    with pytest.raises(SystemExit):
        main(["train", "--resume", "--out", str(tmp_path / "none")])
    assert "holds no run to resume (no train.json, no checkpoint)" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_finished_run_is_trained_longer_and_nothing_else_is_changed(run, tmp_path, capsys):
    shutil.copytree(run / "run", tmp_path / "run", symlinks=True)
    resume = ["train", "--resume", "--out", str(tmp_path / "run")]
    main(resume)
    assert "is finished: it has taken all of its 8 steps" in capsys.readouterr().out
    main([*resume, "--steps", "12", "--log-every", "3", "--save-minutes", "0"])
    printed = capsys.readouterr().out
    assert "12 steps × 128 tokens" in printed and "step-00000012" in printed
    kept = json.loads((tmp_path / "run" / "train.json").read_text())
    assert (kept["steps"], kept["flops"], kept["log_every"], kept["save_minutes"]) == (
        12,
        None,
        3,
        0,
    )
    assert found_json(capsys, "info", tmp_path / "run")["training"]["step"] == 12
    for flags in (["--optim.lr", "1"], ["--preset", "mini"], ["--model.dim=64"], ["--config", "x"]):
        with pytest.raises(SystemExit):
            main([*resume, *flags])
        said = capsys.readouterr().err
        assert f"leave out {flags[0].split('=')[0]}" in said and "--steps" in said


def test_a_branch_goes_on_to_more_steps_with_another_rate(run, tmp_path, capsys):
    start = run / "run" / "checkpoints" / "step-00000008"
    with pytest.raises(SystemExit):
        main(["train", "--branch-from", str(start), "--out", str(tmp_path / "b")])
    assert "takes --cooldown-steps N" in capsys.readouterr().err
    branch = ["train", "--branch-from", str(tmp_path / "trunk"), "--steps", "9"]
    flags = ["--config", str(run / "run.toml"), "--save-every", "4", "--optim.cooldown", "0"]
    main(["train", *flags, "--steps", "4", "--out", str(tmp_path / "trunk")])
    anew = ["--optim.lr", "1e-3", "--log-every", "3", "--no-calibrate"]
    main([*branch, *anew, "--out", str(tmp_path / "b")])
    kept = json.loads((tmp_path / "b" / "train.json").read_text())
    assert kept["optim"]["lr"] == 1e-3 and kept["steps"] == 9 and kept["seq_len"] == 32
    assert kept["branch_from"].endswith("trunk/checkpoints/step-00000004")
    assert (kept["log_every"], kept["calibrate"], kept["save_every"]) == (3, False, 4)
    assert (tmp_path / "b" / "checkpoints" / "step-00000009").is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_exits_with_130_and_says_how_to_go_on(
    run, tmp_path, monkeypatch, capsys, number
):
    def interrupted(config, state, *rest):
        if state.step == 2:
            signal.raise_signal(number)
        return step(config, state, *rest)

    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", interrupted)
    common = ["--config", str(run / "run.toml"), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        main(["train", *common])
    printed = capsys.readouterr().out
    assert stopped.value.code == 130
    assert printed.index("stopping after this step, with a checkpoint; Ctrl-C again") < (
        printed.index("interrupted: saved after step 3; continue with --resume")
    )
    assert f"checkpoint: {tmp_path / 'run' / 'checkpoints' / 'step-00000003'}" in printed
    main(["train", "--resume", "--out", str(tmp_path / "run")])
    assert "step-00000006" in capsys.readouterr().out


def test_a_run_finds_its_data_from_another_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run)
    common = ["--preset", "tiny", "--seq-len", "32", "--steps", "2", "--out", str(tmp_path / "run")]
    main(["train", "--data.path", "a.jsonl", "--data.tokenizer", "bytes", *common])
    monkeypatch.chdir(tmp_path)
    main(["train", "--resume", "--steps", "3", "--out", "run"])
    main(["eval", "run", "--max-windows", "1"])
    assert "checkpoint: run/checkpoints/step-00000003" in capsys.readouterr().out


def test_settings_that_the_data_or_the_length_decide_are_named(run, tmp_path, capsys):
    common = ["train", "--data.path", str(run / "a.jsonl"), "--data.tokenizer", "bytes"]
    common += ["--preset", "tiny", "--seq-len", "32", "--out", str(tmp_path / "run")]
    for flags, said in (
        ("--model.vocab-size 300", "--model.vocab-size has no effect beside the tokenizer, which"),
        ("--steps 3 --keep-steps 2 100", "--keep-steps has no effect for step 100, as the run end"),
        ("--flops 1 --keep-steps 2", "flops=1 is less than"),
    ):
        with pytest.raises(SystemExit):
            main([*common, *flags.split()])
        assert said in capsys.readouterr().err
    main([*common, "--model.vocab-size", "257", "--steps", "2", "--keep-steps", "2"])
    assert mor.load(tmp_path / "run").config.vocab_size == 257
    with pytest.raises(SystemExit):
        main(["train", "--resume", "--out", str(tmp_path / "run"), "--keep-steps", "3"])
    assert "--keep-steps has no effect for step 3, as the run ends at step 2" in (
        capsys.readouterr().err
    )
    file = tmp_path / "run.toml"
    file.write_text("keep_steps = [9]\n[model]\nvocab_size = 300\n")
    with pytest.warns(UserWarning) as warned:
        Train.read([*common[1:5], "--steps", "3", "--config", str(file)], "mor train")
    said = sorted(str(each.message).partition(" in ")[0] for each in warned)
    assert said == ["keep_steps", "model.vocab_size"]
