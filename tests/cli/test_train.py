"""mor train: settings of files and flags, a moved run, and what it will do."""

import json
import shutil
from dataclasses import replace

import pytest

from mor.cli import main
from mor.cli.train import header
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
