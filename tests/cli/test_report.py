"""mor report: analyses of a run, and the page that collects them."""

import json

import pytest
import torch

from mor import checkpoint
from mor.analysis.report import ENTRIES
from mor.cli import main
from mor.data.tokenizer import byte_tokenizer
from tests.analysis.small_corpus import TEXT
from tests.conftest import tiny


def metrics(router):
    health = {"depth_entropy": 0.9, "agreement": 0.8, "dead_positions": 0.0} if router else {}
    shares = [1.0, 0.7, 0.3] if router else [1.0]
    for step in (1, 2):
        yield {
            "step": step,
            "tokens": step * 10,
            "loss": 3.0 / step,
            "share_per_recursion": shares,
        } | health
        yield {"step": step, "tokens": step * 10, "validation_nll": 3.1 / step}


def test_the_command_reports_a_run_and_collects_again_without_analysing(
    tmp_path, capsys, monkeypatch, undrawn
):
    loaded_to, load = [], checkpoint.load
    monkeypatch.setattr(
        checkpoint, "load", lambda *path, device: (loaded_to.append(device), load(*path))[1]
    )
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    model = tiny("expert_choice", vocab_size=257)
    checkpoint.save(run / "checkpoints" / "step-00000002", model, byte_tokenizer())
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics(True)))
    (tmp_path / "text.txt").write_text(TEXT * 6)
    main(
        [
            "report",
            str(run),
            "--data",
            str(tmp_path / "text.txt"),
            "--seq-len",
            "24",
            "--max-windows",
            "4",
            "--device",
            "cpu",
        ]
    )
    assert loaded_to == [torch.device("cpu")]
    page = (run / "report.html").read_text()
    assert (
        all(f'id="{name}"' in page for name in ENTRIES)
        and "1.5500" in page
        and "collapsed" not in page
    )
    assert "report.html" in capsys.readouterr().out
    (run / "tables" / "extra.csv").write_text("a,b\n1,2\n")
    main(["report", str(run), "--no-analyse", "--out", str(tmp_path / "again.html")])
    assert 'id="extra"' in (tmp_path / "again.html").read_text()
    with pytest.raises(SystemExit):
        main(["report", str(run), "--device", "tpu"])
    assert "there is no device 'tpu'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "not a folder"),
        ([".", "--max-windows", "0"], "at least 1"),
        ([".", "--out", "."], "--out: . cannot be a file"),
        ([".", "--out", "missing/a.html"], "--out: missing/a.html cannot be a file"),
    ],
)
def test_mistakes_end_in_one_line_that_helps(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["report", *arguments])
    assert words in capsys.readouterr().err
