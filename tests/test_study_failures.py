"""Studies in trouble: killed workers, names that clash, damaged files, mistakes in study files."""

import multiprocessing
import os
import shutil
import signal
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console
from test_sweep import BASE, QUIET, study, study_file

from mor.cli import main
from mor.files import read_json, write_json
from mor.model.config import ModelConfig
from mor.run_folder import RunFolder
from mor.studies import launch as launch_module
from mor.studies.launch import DIED, launch, run_one, run_study
from mor.studies.report import _cell
from mor.studies.results import collect
from mor.studies.settings import Workers
from mor.studies.study import Run, load_study, main_runs, tuning_runs


@dataclass(frozen=True, kw_only=True)
class Killed(Run):
    """Dies in its worker as if out of memory, the first time or always."""

    times: int = 1000

    def __getattribute__(self, name):
        if name == "config" and multiprocessing.parent_process():
            marks = Path(super().__getattribute__(name).out + ".deaths")
            deaths = len(marks.read_text()) if marks.is_file() else 0
            if deaths < self.times:
                marks.parent.mkdir(parents=True, exist_ok=True)
                marks.write_text("x" * (deaths + 1))
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)


def killed(run, times):
    return Killed(**vars(run), times=times)


def test_a_killed_worker_fails_no_other_run_and_is_tried_again_alone(tmp_path):
    always, once, whole = main_runs(study(tmp_path), tmp_path / "out", {})[0][:3]
    runs, console = (
        [killed(always, 1000), killed(once, 1), replace(whole, row="[/b]")],
        Console(file=StringIO()),
    )
    outcomes = launch(runs, Workers(jobs=2), console, folder=tmp_path)
    assert "finished    main   [/b], seed" in console.file.getvalue()
    assert {o.run.config.out: (o.status, o.reason) for o in outcomes} == {
        always.config.out: ("failed", DIED),
        once.config.out: ("finished", ""),
        whole.config.out: ("finished", ""),
    }
    assert Path(always.config.out + ".deaths").read_text() == "xx", "beside others, then alone"


def test_no_rate_is_chosen_from_half_a_grid(tmp_path, monkeypatch):
    found = study(tmp_path, "[tuning]\nrates = [1e-3, 1e-2]\nshare = 0.5\n")
    runs, ran = tuning_runs(found, tmp_path / "out"), []

    def some_die(runs, *_, **__):
        ran.extend(runs)
        return [
            run_one(run, 1) for run in runs if (run.stage, run.config.optim.lr) != ("tuning", 1e-2)
        ]

    monkeypatch.setattr(launch_module, "launch", some_die)
    with pytest.raises(ValueError, match="rates of recursive, one pass are still to be tried"):
        run_study(found, tmp_path / "out", Workers(), QUIET)
    assert ran == runs
    for run in runs:  # a rate that fails by itself is out of the running
        if run.config.optim.lr == 1e-2:
            (Path(run.config.out)).mkdir(parents=True)
            (Path(run.config.out) / "error.txt").write_text("its loss is not finite\n")
    run_study(found, tmp_path / "out", Workers(), QUIET)
    assert {run.config.optim.lr for run in ran if run.stage == "main"} == {1e-3}


def test_a_run_that_another_process_trains_is_left_as_it_is(tmp_path):
    run = main_runs(study(tmp_path), tmp_path / "out", {})[0][0]
    path = Path(run.config.out)
    path.mkdir(parents=True)
    with FileLock(path / ".lock"):
        outcome = run_one(run, 1)
    assert outcome.status == "failed" and "another process is training" in outcome.reason
    assert [file.name for file in path.iterdir()] == [".lock"], (
        "neither its place in the study nor an error"
    )


def test_branches_outlive_the_checkpoints_they_began_with(tmp_path):
    found = study(tmp_path, base="budgets = [4e7, 6e7]\n" + BASE)
    trunk, branch = (stage[0] for stage in main_runs(found, tmp_path / "out", {}))
    assert trunk.config.save_every < branch.branch_step
    other = replace(
        branch, config=replace(branch.config, optim=replace(branch.config.optim, lr=0.5))
    )
    assert run_one(trunk, 1).status == "finished"
    assert (
        f"{trunk.config.out} holds a run with other settings (optim.lr" in run_one(other, 1).reason
    )
    assert run_one(branch, 1).status == "finished"
    folder = RunFolder(Path(trunk.config.out))
    checkpoints = folder.checkpoints()
    kept = {folder.checkpoint(step) for step in (*trunk.config.keep_steps, trunk.config.steps)}
    assert kept < set(checkpoints) and len(checkpoints) == len(kept) + 1, (
        "those to branch off, and the newest two"
    )
    assert {path.name for path in checkpoints[0].parent.iterdir()} == {p.name for p in checkpoints}
    shutil.rmtree(checkpoints[0].parent)
    assert run_one(branch, 1).status == "kept"
    assert "optim.lr 0.003, now 0.5" in run_one(other, 1).reason
    assert [row["status"] for row in collect(tmp_path / "out")] == ["failed", "finished"], (
        "not what is asked for now"
    )
    assert run_one(branch, 1).status == "kept"
    assert [row["status"] for row in collect(tmp_path / "out")] == ["finished", "finished"]


@pytest.mark.parametrize("name", ["train.json", "study.json", "result.json"])
def test_damaged_files_are_named(name, tmp_path):
    runs = main_runs(study(tmp_path), tmp_path, {})[0]
    assert run_one(runs[0], 1).status == "finished"
    path = Path(runs[0].config.out) / name
    whole = read_json(path)
    for damage in (path.read_text()[:-9], "", "[]"):
        path.write_text(damage)
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            collect(tmp_path)
    write_json(path, {"steps": 3.5} if name == "train.json" else {})
    with pytest.raises(ValueError, match=f"{path}.*(must be a whole number|has no )"):
        collect(tmp_path)
    write_json(path, whole)
    shutil.copytree(path.parent, path.parent.with_name("seed-0-old"))
    with pytest.raises(ValueError, match=r"seed-0 and .*seed-0-old hold the same run"):
        collect(tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('[variants."α=1"]\n[variants."β=1"]', "rows 'α=1' and 'β=1' would share the folder '1'"),
        ('[variants."a/b"]\n[variants."a, b"]', "rows 'a/b' and 'a, b' would share"),
        ('[variants."λ"]', "'λ' gets no folder"),
        ('[variants.".."]', "'..' gets no folder"),
        ("[axes]\nsize = { s = {} }\nSize = { l = {} }", "'size' and 'Size' have the same label"),
        (
            '[axes]\n"model.alpha" = [1]\n"router.alpha" = [1]',
            "'model.alpha' and 'router.alpha' have the same label",
        ),
        ("[tuning]\nrates = 3e-3", "tuning.rates must be a list, got 0.003"),
        ("[variants.x]\nlike = ['x']", "no shape"),
        ('[variants.x]\n"model.dim" = 32', "model.dim without quotes"),
        ("[variants.x]\nsteps = 'two'", "steps must be a whole number, got 'two'"),
        ("[variants.x]\nmodel = 3", "model must be a table of settings, got 3"),
        ("[variants.x]\nmodel.router = 'random'", "RouterConfig is made of a table"),
        (
            "[variants.x]\nmodel.num_recursions = 'two'",
            "num_recursions must be a whole number, got 'two'",
        ),
        ("[variants.x]\nat = 3", "'at' is a table"),
        ("[variants.x]\nat.z = {}", "no axis has the value 'z'"),
        ("[variants]\nx = 3", "variants.x must be a table, got 3"),
        ("[axes]\nx = 3", "axes.x must be a list or a table, got 3"),
    ],
)
def test_a_study_that_cannot_run_is_refused_in_one_line(tmp_path, more, message):
    base = BASE.replace("[variants.recursive]", "[variants.recursive]\n", 1)
    if more.startswith("[variants]"):
        base, more = BASE[: BASE.index("[variants")], more
        base = base.replace('reference = "recursive"', "").replace("depth_pays", "# ")
    with pytest.raises(ValueError, match=message):
        main_runs(study(tmp_path, more, base), tmp_path, {})


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('title = "Test"', "", "title is missing"),
        ('title = "Test"', "title = 3", "title must be text, got 3"),
        ('title = "Test"', 'title = ""\nsize = 3', "size names a file"),
        ("seeds = [0, 1]", "seeds = 3", "seeds must be a list, got 3"),
        ("seeds = [0, 1]", 'seeds = [0.5, "x"]', r"seeds\[0\] must be a whole number, got 0.5"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "seeds must differ"),
        ("seeds = [0, 1]", "budgets = [1e7, 1e7]", "budgets must grow"),
        ("seeds = [0, 1]", "budgets = [0, 1e7]", r"budgets\[0\] must be greater than 0, got 0"),
        ("windows = 8", "windows = 0", "windows must be at least 1"),
    ],
)
def test_settings_of_the_study_itself_are_checked(tmp_path, before, after, message):
    with pytest.raises(ValueError, match=message):
        load_study(study_file(tmp_path, base=BASE.replace(before, after)))


def test_whole_numbers_are_floats_but_words_are_no_numbers():
    assert ModelConfig.from_dict({"rope_theta": 10000, "router": {"alpha": 1}}).router.alpha == 1
    with pytest.raises(ValueError, match=r"router.alpha must be a number, got '1'"):
        ModelConfig.from_dict({"router": {"alpha": "1"}})


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
