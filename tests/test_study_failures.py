"""Studies in trouble: killed workers, names that clash, damaged files, mistakes in study files."""

import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_sweep import QUIET, study

from mor.studies import launch as launch_module
from mor.studies.launch import DIED, launch, run_one, run_study
from mor.studies.settings import Workers
from mor.studies.study import Run, main_runs, tuning_runs


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
    outcomes = launch([killed(always, 1000), killed(once, 1), whole], Workers(jobs=2), QUIET, folder=tmp_path)
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
        return [run_one(run, 1) for run in runs if (run.stage, run.config.optim.lr) != ("tuning", 1e-2)]

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
