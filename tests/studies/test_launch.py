"""Runs of a study survive kills, failures and moves."""

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from rich.console import Console

import mor.training.loop as train_module
from mor.cli import main
from mor.run_folder import RunFolder
from mor.studies import launch as launch_module
from mor.studies.launch import DIED, flops_of, launch, run_one, run_study, visible_gpus
from mor.studies.results import collect
from mor.studies.settings import Workers
from mor.studies.study import Run, load_study, main_runs, tuning_runs
from tests.studies.small_study import BASE, QUIET, of, study, study_file


def test_a_study_runs_keeps_what_is_finished_and_lists_what_failed(tmp_path, capsys):
    path, out = (
        study_file(tmp_path, "[variants.broken]\ndata.path = 'none.txt'\n"),
        tmp_path / "out",
    )
    runs = [run for run in main_runs(load_study(path), out, {})[0] if run.variant != "broken"]
    assert [(run.variant, run.seed) for run in runs] == [
        (v, s) for s in (0, 1) for v in ("recursive", "one pass")
    ]
    for run in runs[:3]:
        assert run_one(run, 1).status == "finished"
    before = (out / "runs/recursive/seed-0/result.json").stat().st_mtime_ns
    with pytest.raises(SystemExit, match="1"):
        main(["sweep", str(path), "--out", str(out), "--variants", "one pass", "broken"])
    printed = capsys.readouterr().out
    assert (out / "runs/recursive/seed-0/result.json").stat().st_mtime_ns == before
    # while running, and in the report
    assert printed.count("finished ") == 1 and printed.count("none.txt") == 4
    assert printed.index("the same unique layers applied once") < printed.index(
        "paired differences"
    )
    assert all(
        (out / f"figures/{name}").stat().st_size > 5000
        for name in ("rows.png", "rows.svg", "hops.png", "hops.svg")
    )

    found = json.loads((out / "runs/one-pass/seed-1/result.json").read_text())
    (out / "runs/one-pass/seed-1/result.json").write_text(
        json.dumps(found | {"validation_nll": float("nan")})
    )
    (out / "results.sqlite").unlink()
    main(["sweep", str(path), "--out", str(out), "--report"])
    assert "left out, its NLL is not a number" in capsys.readouterr().out
    main(["report", str(out)])
    page = (out / "report.html").read_text()
    assert page.index("the same unique layers applied once") < page.index("Rows of the study")
    with sqlite3.connect(out / "results.sqlite") as database:
        columns = "row, seed, status, validation_nll, config_model_dim, share_per_recursion"
        query = f"select {columns} from runs"
        rows = {row[:2]: row[2:] for row in database.execute(query)}
    assert len(rows) == 6 and rows["broken", 0][0] == "failed"
    status, nll, dim, share = rows["recursive", 1]
    assert (status, dim, json.loads(share)) == ("finished", 16, [1.0, 1.0]) and nll > 0


def test_an_interrupted_run_goes_on_and_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    runs = main_runs(study(tmp_path), tmp_path / "a", {})[0]
    whole, cut = runs[0], main_runs(study(tmp_path), tmp_path / "b", {})[0][0]
    assert run_one(whole, 1).status == "finished"
    step = train_module.train_step

    def step_and_terminate(config, state, *rest):
        result = step(config, state, *rest)
        if state.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(train_module, "train_step", step_and_terminate)
    assert run_one(cut, 1).status == "interrupted"
    monkeypatch.setattr(train_module, "train_step", step)
    assert [row["status"] for row in collect(tmp_path / "b")] == ["unfinished"]
    assert run_one(cut, 1).status == "finished" and run_one(cut, 1).status == "kept"
    a, b = (json.loads((Path(run.config.out) / "result.json").read_text()) for run in (whole, cut))
    assert a["validation_nll"] == b["validation_nll"] and b["steps"] == 4


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    run = main_runs(study(tmp_path), tmp_path, {})[0][0]
    assert run_one(run, 1).status == "finished"
    other = replace(run, config=replace(run.config, optim=replace(run.config.optim, lr=0.5)))
    outcome = run_one(other, 1)
    assert outcome.status == "failed" and "optim.lr 0.003, now 0.5" in outcome.reason


def test_a_cluster_gets_the_same_runs(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    runs = main_runs(study(tmp_path), tmp_path / "out", {})[0][:2]
    broken = replace(
        runs[1], config=replace(runs[1].config, data=replace(runs[1].config.data, path="none.txt"))
    )
    outcomes = launch([runs[0], broken], Workers(cluster="debug"), QUIET, folder=tmp_path)
    assert {o.run.config.out: o.status for o in outcomes} == {
        runs[0].config.out: "finished",
        broken.config.out: "failed",
    }
    assert any("none.txt" in o.reason for o in outcomes)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no srun"):
        launch(runs, Workers(cluster="slurm"), QUIET, folder=tmp_path)
    with pytest.raises(ValueError, match="at least 1"):
        Workers(jobs=0)


def test_gpus_that_are_not_there_or_would_stand_idle_are_refused(tmp_path, monkeypatch):
    runs = main_runs(study(tmp_path), tmp_path / "out", {})[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="gpus=3, but PyTorch sees 2"):
        launch(runs, Workers(gpus=3), QUIET, folder=tmp_path)
    with pytest.raises(ValueError, match="GPUs would stand idle"):
        launch(runs, Workers(gpus=2), QUIET, folder=tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8f,7")
    assert visible_gpus(2) == ["5", "GPU-8f"], "of those that the study itself was given"


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
    assert [row["status"] for row in collect(tmp_path / "out")] == ["finished"] * 2, (
        "refusing another run in its place leaves a finished one as it is"
    )
    assert run_one(branch, 1).status == "kept"
    assert [row["status"] for row in collect(tmp_path / "out")] == ["finished", "finished"]


def planned(ran, out=None):
    """Trunks and branches, with the rates that the runs were tuned to."""
    study, folder, rows = ran
    rates = {row["row"]: row["config_optim_lr"] for row in rows if row["stage"] == "main"}
    return main_runs(study, out or folder, rates)


def test_rates_are_tuned_at_the_smallest_budget_and_used(ran):
    study, out, rows = ran
    _, branches = planned(ran)
    for run in tuning_runs(study, out):
        small = next(b for b in branches if b.row == run.row)
        assert (
            run.config.steps == round(small.config.steps * 0.5)
            and run.config.seed == study.tuning.seed
        )
        assert not run.exits
    assert {row["config_optim_lr"] for row in of(rows, "tuning")} == {1e-6, 1e-2}
    assert {row["config_optim_lr"] for row in of(rows, "main", "branch")} == {1e-2}, (
        "a rate of 1e-6 learns nothing"
    )


def test_branches_leave_where_their_cool_down_begins_and_cost_what_is_theirs(ran):
    rows = ran[2]
    trunks, branches = planned(ran)
    for run in branches:
        trunk = next(t for t in trunks if t.config.out == run.trunk)
        total, cooldown = run.config.steps, run.config.optim.cooldown
        assert (
            total >= 10
            and abs(run.branch_step - (1 - cooldown) * total) <= trunk.config.save_every / 2
        )
        assert flops_of(run) == pytest.approx(run.budget * (1 - run.branch_step / total), rel=0.1)
        assert flops_of(trunk) == pytest.approx(trunk.budget, rel=0.1)
        # The trunk warms up for as many steps as a run of the smallest budget would alone.
        assert trunk.config.optim.warmup * trunk.config.steps == pytest.approx(0.2 * total)
        row = next(row for row in rows if row["path"] == run.config.out)
        assert (row["steps"], row["budget"]) == (total, run.budget)
        assert row["train_flops"] == pytest.approx(run.budget, rel=0.1), "with its trunk's"


def test_a_moved_study_is_the_same_study_and_old_failures_are_forgotten(ran, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(ran[1], moved)
    stages = planned(ran, moved)
    ran[1].rename(tmp_path / "gone")
    try:
        for run in (run for stage in stages for run in stage):
            assert run_one(run, 1).status == "kept"
        again = stages[1][0]
        place = Path(again.config.out)
        (place / "result.json").unlink()
        (place / "error.txt").write_text("out of memory")
        assert (
            next(row for row in collect(moved) if row["path"] == str(place))["status"] == "failed"
        )
        assert run_one(again, 1).status == "finished" and not (place / "error.txt").exists()
    finally:
        (tmp_path / "gone").rename(ran[1])
