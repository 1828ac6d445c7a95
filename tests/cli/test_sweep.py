"""mor sweep: the plan of a study, and the tables of published losses."""

from pathlib import Path

import pytest

from mor.cli import main
from mor.studies.study import load_study, main_runs


def test_published_losses_give_tables_and_figures(tmp_path, capsys):
    main(["sweep", "--fit", "paper", "--out", str(tmp_path), "--resamples", "20"])
    printed = capsys.readouterr().out
    assert "36 losses" in printed and "Recurrence law" in printed
    assert {p.name for p in (tmp_path / "tables").iterdir()} == {
        "optima.csv",
        "paths.csv",
        "recurrence_law.csv",
    }
    assert (tmp_path / "figures/isoflop.svg").stat().st_size > 10_000


FOLDER = Path(__file__).parents[2] / "studies"


STUDIES = sorted(FOLDER.glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_ready_study_can_be_planned_at_every_size(path, tmp_path):
    assert STUDIES
    for size in (None, *FOLDER.glob("sizes/*.toml")):
        found = load_study(path, size=size)
        assert (
            len(found.seeds) >= 2
            and found.depth_pays.deep
            and found.depth_pays.shallow
            and found.reference
        )
        if found.budgets and size is not None:
            continue  # budgets and sizes belong together
        runs = [run for stage in main_runs(found, tmp_path, {}) for run in stage]
        assert len({run.config.out for run in runs}) == len(runs) > 0
