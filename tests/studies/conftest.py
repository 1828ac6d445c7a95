"""A study that ran once."""

import pytest

import mor.studies.launch as launch_module
from mor.studies.launch import run_one, run_study
from mor.studies.results import collect
from mor.studies.settings import Workers
from mor.studies.study import load_study
from tests.studies.small_study import QUIET, STUDY


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """(study, its folder, rows of its runs): two variants, two budgets, two seeds and their tuning,
    in this process."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(STUDY)
    study, out = load_study(folder / "study.toml"), folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            launch_module, "launch", lambda runs, *_, **__: [run_one(run, 1) for run in runs]
        )
        outcomes = run_study(study, out, Workers(), QUIET)
    assert {outcome.status for outcome in outcomes} == {"finished"}
    return study, out, collect(out)
