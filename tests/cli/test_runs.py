"""mor runs: every run below a folder."""

import shutil

import pytest

from mor.cli import main
from tests.cli.printed import found_json


def test_runs_lists_every_run_below_a_folder(some_runs, capsys):
    rows = {row["run"]: row for row in found_json(capsys, "runs", some_runs)}
    assert sorted(rows) == ["begun", "deep/other", "one", "two"]
    assert rows["one"]["finished"] and rows["one"]["best_nll"] <= rows["one"]["last_nll"]
    assert rows["deep/other"]["family"] == "recursive" and rows["deep/other"]["tokens"] == 256
    assert (rows["begun"]["step"], rows["begun"]["total_steps"]) == (0, 8)
    assert not rows["begun"]["finished"] and rows["begun"]["last_nll"] is None
    main(["runs", str(some_runs)])
    shown = capsys.readouterr().out
    assert "deep/other" in shown and "0/8" in shown and "unfinished" in shown


def test_a_damaged_run_hides_no_other(some_runs, tmp_path, capsys):
    shutil.copytree(some_runs / "one", tmp_path / "runs" / "one")
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "train.json").write_text('{"steps": 3')
    bad, one = found_json(capsys, "runs", tmp_path / "runs")
    assert "train.json is damaged" in bad["problem"] and one["problem"] is None
    main(["runs", str(tmp_path / "runs")])
    assert "unreadable" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    main(["runs", str(tmp_path / "empty")])
    assert "holds no runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "nowhere"], "neither a checkpoint"),
        (["info", "."], ". is a folder of runs; mor runs . lists them"),
        (["runs", "nowhere"], "not a folder"),
        (["compare"], "needs two or more runs or checkpoints\n"),
        (["info", "prepared"], "prepared is prepared data; mor data info prepared shows it"),
        (["compare", "nowhere", "nowhere"], "neither a checkpoint"),
        (["compare", "nowhere"], "needs two or more runs or checkpoints, got only nowhere"),
    ],
)
def test_mistakes_are_explained(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.json").write_text("{}")
    (tmp_path / "prepared").mkdir()
    for name in ("manifest.json", "tokenizer.json"):
        (tmp_path / "prepared" / name).write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and words in printed and printed.count("\n") == 1
