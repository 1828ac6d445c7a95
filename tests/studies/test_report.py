"""Tables of a study."""

import re
from pathlib import Path
from statistics import fmean

import pytest

from mor.cli import main
from mor.studies import compare
from mor.studies.launch import run_one
from mor.studies.report import Output, _cell, exits
from mor.studies.results import finished
from mor.studies.study import load_study, main_runs
from tests.studies.small_study import BASE, study_file


def test_nothing_to_report_is_said_and_old_tables_go(tmp_path, capsys):
    path, out = study_file(tmp_path), tmp_path / "out"
    with pytest.raises(SystemExit):
        main(["sweep", str(path), "--out", str(out), "--report"])
    assert (
        capsys.readouterr().err
        == f"error: {out} holds no runs yet; start the study without --report\n"
    )
    for old in ("tables/recurrence_law.csv", "figures/isoflop.svg", "tables/mine.csv"):
        (out / old).parent.mkdir(parents=True, exist_ok=True)
        (out / old).write_text("old")
    assert run_one(main_runs(load_study(path), out, {})[0][0], 1).status == "finished"
    main(["sweep", str(path), "--out", str(out), "--report"])
    assert sorted(file.name for file in (out / "tables").iterdir()) == ["mine.csv", "rows.csv"]
    assert not (out / "figures/isoflop.svg").exists()
    with pytest.raises(SystemExit):
        main(["sweep", "--fit", "paper", "--out", str(tmp_path / "fit"), "--resamples", "0"])
    assert capsys.readouterr().err == "error: resamples must be at least 1, got 0\n"


def contents(folder):
    return {
        file.relative_to(folder): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


@pytest.mark.parametrize("changed", ["steps = 5", "steps = 4\noptim.lr = 1e-4"])
def test_a_changed_study_leaves_a_finished_one_as_it_is(tmp_path, capsys, changed):
    path, out = study_file(tmp_path), tmp_path / "out"
    for run in main_runs(load_study(path), out, {})[0]:
        assert run_one(run, 1).status == "finished"
    main(["sweep", str(path), "--out", str(out)])
    written = "results.sqlite, summary.json, tables/, figures/"
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {out}/{written}"
    before = contents(out)
    assert {"tables", "figures"} < {file.parts[0] for file in before}
    path.write_text(BASE.replace("\nsteps = 4\n", f"\n{changed}\n"))
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", str(path), "--out", str(out)])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "written" not in said.out
    assert re.search(
        r"seed-0 holds a run with other settings \((steps 4, now 5|optim.lr)", said.err
    )
    assert contents(out) == before


def test_an_error_in_a_report_leaves_the_earlier_one(tmp_path):
    for name in ("tables/rows.csv", "figures/rows.svg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("old")
    before = contents(tmp_path)
    with pytest.raises(OSError, match="disk"), Output(tmp_path) as out:
        raise OSError("no room on the disk")
    assert contents(tmp_path) == before and out.files == []
    with Output(tmp_path) as out:
        out.summary({"a": "b", "empty": ""})
    assert contents(tmp_path) == {Path("summary.json"): b'{\n  "a": "b"\n}'}
    assert str(out) == f"{tmp_path}/summary.json"


def test_brackets_in_names_are_shown_as_they_are(tmp_path, capsys):
    base = (
        BASE.replace('"Test"', '"T [/b]"')
        .replace("recursive", "a [red]")
        .replace("variants.a [red]", 'variants."a [red]"')
    )
    path, out = (
        study_file(tmp_path, '[variants."b [/b]"]\ndata.path = "[/b].txt"\n', base),
        tmp_path / "out",
    )
    main(["sweep", str(path), "--out", str(out), "--dry-run"])
    assert "a [red] (main)" in capsys.readouterr().out
    assert run_one(main_runs(load_study(path), out, {})[0][0], 1).status == "finished"
    with pytest.raises(SystemExit):
        main(["sweep", str(path), "--out", str(out), "--variants", "b [/b]", "--seeds", "0"])
    printed = capsys.readouterr().out
    assert "T [/b] →" in printed and "failed      main   b [/b], seed 0: [/b].txt" in printed
    assert "│ a [red] │" in printed and "failed: " in printed


def test_large_numbers_have_their_unit():
    shown = {
        1.6e12: "1.6T",
        9.999e11: "1T",
        4e11: "400B",
        1234.0: "1.23k",
        0.5: "0.500",
        5e19: "5e+19",
    }
    assert {value: _cell(value) for value in shown} == shown


def test_the_table_holds_the_figures_of_the_runs(ran):
    study, _, rows = ran
    runs = finished(rows, "main", "branch")
    by = {(run["variant"], run["budget"], run["seed"]): run for run in runs}
    lines = {line.row: line for line in compare.lines(study, runs)}
    assert list(lines) == [
        f"{v}, width narrow, {b} FLOPs" for v in ("recursive", "MoR") for b in ("6e+07", "1.2e+08")
    ]
    line = lines["MoR, width narrow, 6e+07 FLOPs"]
    mine, other = ([by[v, 6e7, seed] for seed in (0, 1)] for v in ("MoR", "recursive"))
    assert line.nll == pytest.approx(fmean(run["validation_nll"] for run in mine))
    gaps = [a["validation_nll"] - b["validation_nll"] for a, b in zip(mine, other, strict=True)]
    assert line.difference == pytest.approx(fmean(gaps))
    assert (
        line.mean_depth == pytest.approx(fmean(run["mean_depth"] for run in mine))
        and line.mean_depth != 1
    )
    assert lines["recursive, width narrow, 6e+07 FLOPs"].difference is None


def test_exits_are_compared_with_random_ones():
    runs = [
        dict(row="x", budget=None, seed=seed)
        | dict(
            exits={
                name: dict(nll=nll + seed, mean_depth=2.0 + seed)
                for name, nll in (("random", 3.0), *known.items())
            }
        )
        for seed, known in enumerate(
            (dict(confidence=2.0, oracle=1.0), dict(confidence=2.2, oracle=1.1))
        )
    ]
    found = {line.policy: line for line in exits(runs)}
    assert found["confidence"].difference == pytest.approx(-0.9) and found[
        "oracle"
    ].difference == pytest.approx(-1.95)
    assert (
        found["random"].difference is None
        and found["random"].nll == 3.5
        and found["oracle"].mean_depth == 2.5
    )
