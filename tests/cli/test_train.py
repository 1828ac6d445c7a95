"""mor train: settings of files and flags, a moved run, and what it will do."""

import json
import shutil
import signal
from dataclasses import replace

import pytest

from mor.cli import main
from mor.cli.train import header
from mor.training import loop
from mor.training.config import TrainConfig


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
