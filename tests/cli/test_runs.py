"""mor runs: every run below a folder."""

import shutil

import pytest

from mor.cli import main
from mor.cli.runs import _count
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


def test_names_stay_whole_on_a_narrow_terminal(some_runs, tmp_path, capsys, monkeypatch):
    name = "state-tracking-with-expert-choice/seed-0"
    shutil.copytree(some_runs / "one", tmp_path / name)
    for width, left_out in ((200, ""), (100, "best NLL"), (80, "layout, tokens, best NLL")):
        monkeypatch.setenv("COLUMNS", str(width))
        main(["runs", str(tmp_path)])
        shown = capsys.readouterr().out
        assert name in shown and "8/8" in shown and "finished" in shown and "mor" in shown
        assert (f"for want of room without {left_out}: see --json" in shown) == bool(left_out)
        assert ("best NLL" in shown.splitlines()[1]) == (width == 200)
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_tokens_have_a_unit_that_fits():
    shown = {0: "0", 512: "512", 1024: "1.02k", 98_304: "98.3k", 999_999: "1.00M", 2e9: "2.00B"}
    assert {number: _count(number) for number in shown} == shown


def test_a_run_that_failed_says_so_and_why(some_runs, tmp_path, capsys):
    """Also one that failed before it had settings."""
    shutil.copytree(some_runs / "begun", tmp_path / "late")
    (tmp_path / "early").mkdir()
    for name in ("late", "early"):
        (tmp_path / name / "error.txt").write_text(f"no room for [{name}]\n\nTraceback")
    early, late = found_json(capsys, "runs", tmp_path)
    assert (early["run"], early["failed"]) == ("early", "no room for [early]")
    assert (late["failed"], late["total_steps"], late["problem"]) == ("no room for [late]", 8, None)
    main(["runs", str(tmp_path)])
    shown = capsys.readouterr().out
    assert shown.count("failed") == 2 and "unfinished" not in shown
    assert "late: no room for [late]\n" in shown and "early: no room for [early]\n" in shown


def test_a_run_without_its_settings_file_is_the_same_run(some_runs, tmp_path, capsys):
    shutil.copytree(some_runs / "one", tmp_path / "runs" / "one", symlinks=True)
    paths = ("runs", tmp_path / "runs"), ("info", tmp_path / "runs" / "one")
    before = [found_json(capsys, *path) for path in paths]
    (tmp_path / "runs" / "one" / "train.json").unlink()
    after = [found_json(capsys, *path) for path in paths]
    for values in (before[1], after[1]):
        values.pop("checkpoints", None)  # with the size of the folder
    assert after == before


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
