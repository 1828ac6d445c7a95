"""A study's losses over inference depth: asked for in its file, measured once."""

import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from mor import checkpoint
from mor.cli import main
from mor.data.config import DataConfig
from mor.data.corpus import load_corpus
from mor.evaluation.calibrate import calibrate
from mor.evaluation.nll import evaluate
from mor.files import read_json, write_json
from mor.studies.depth_report import judge, rows_of, verdicts
from mor.studies.depths import CURVES, _Chosen, measure_missing, read_curves
from mor.studies.launch import run_one
from mor.studies.results import collect, finished
from mor.studies.study import curve_asked, load_study, main_runs, variants_named
from tests.studies.small_study import BASE, study, study_file

MORE = """
[variants.MoR]
model = { num_layers = 4, num_recursions = 2, router = { kind = "expert_choice" } }
"""
DEPTHS = """
[choosers]
MoR = ["random", "confidence"]

[[claims]]
name = "depth is worth something"
row = "recursive"
against = ["one pass"]
depths = ["best", "full"]
below = 9.0

[[claims]]
name = "choosing"
row = "MoR"
against = ["MoR, by random", "MoR, by confidence"]
depths = [1.5]
below = -9.0

[[claims]]
name = "spent"
row = "MoR"
depths = [1, 2, 3]
spent_within = 0.2
"""
ASKED = BASE.replace("windows = 8", "windows = 40\ndepths = [1, 1.5, 2, 3]")


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A study that ran before anybody asked for depths: its file, and its folder."""
    folder = tmp_path_factory.mktemp("before")
    path, out = study_file(folder, MORE), folder / "out"
    for run in main_runs(load_study(path), out, {})[0]:
        assert run_one(run, 1).status == "finished"
    assert not list(out.rglob(CURVES))
    return path, out


@pytest.fixture
def asked(before, tmp_path):
    """The same, copied, with depths asked for."""
    out = tmp_path / "out"
    shutil.copytree(before[1], out, symlinks=True)
    return study_file(tmp_path, MORE + DEPTHS, ASKED), out


def test_a_finished_study_is_measured_once_from_its_checkpoints(asked, capsys):
    path, out = asked
    main(["sweep", str(path), "--out", str(out), "--report"])
    said = capsys.readouterr().out
    assert "depth is worth something: holds (2 of 2)" in said
    assert "choosing: does not hold (0 of 1; not: MoR at 1.5 against MoR, by" in said
    curves = {file: file.read_bytes() for file in out.rglob(CURVES)}
    assert len(curves) == 6
    summary = read_json(out / "summary.json")
    assert summary["spent"] == "holds (3 of 3)" and "does depth pay?" in summary
    table = (out / "tables/rows.csv").read_text().splitlines()
    assert table[0].endswith("full_depth_nll,best_depth_nll,best_depth")
    assert not any(line.endswith(",,,") for line in table), "every row has both"
    assert {"depths.csv", "claims.csv"} < {file.name for file in (out / "tables").iterdir()}
    assert (out / "figures/depths.svg").is_file()
    with closing(sqlite3.connect(out / "results.sqlite")) as database:
        one = "select nll from depths where row = 'MoR, by random' and seed = 0 and depth = 1.5"
        measured_once = database.execute(one).fetchall()
    points = read_curves(out / "runs/MoR/seed-0", curve_asked(load_study(path), "MoR"))["random"]
    assert measured_once == [(next(p["nll"] for p in points if p["depth"] == 1.5),)]
    for weights in out.rglob("*.safetensors"):
        weights.unlink()
    assert missing(load_study(path), out) == {}, "a later report needs no checkpoint"
    assert all(file.read_bytes() == found for file, found in curves.items())


def test_a_sweep_takes_the_finished_runs_and_measures_them(asked):
    path, out = asked
    run = main_runs(load_study(path), out, {})[0][0]
    result = (Path(run.config.out) / "result.json").read_bytes()
    assert run_one(run, 1).status == "kept"
    assert read_curves(Path(run.config.out), run.curve) is not None
    assert read_curves(Path(run.config.out), run.curve | {"windows": 20}) is None, "ask anew"
    assert (Path(run.config.out) / "result.json").read_bytes() == result


def test_runs_that_cannot_be_measured_are_named_and_make_the_exit_code_1(asked, capsys):
    path, out = asked
    for weights in (out / "runs/MoR").rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", str(path), "--out", str(out), "--report"])
    assert stopped.value.code == 1
    said = re.findall(r"no depths of (\S+): \S", capsys.readouterr().out)
    assert sorted(said) == sorted(map(str, (out / "runs/MoR").iterdir()))
    assert (out / "tables/rows.csv").is_file(), "everything else is there"


def missing(of, out):
    """Runs that cannot be measured, and why."""
    runs = finished(collect(out), "main")
    return measure_missing((Path(run["path"]), curve_asked(of, run["variant"])) for run in runs)


def test_what_cannot_be_measured_is_said_and_the_rest_kept(asked):
    path, out = asked
    found, broken = load_study(path), out / "runs/MoR/seed-1"
    for folder in broken.glob("checkpoints/*"):
        (folder / "config.json").unlink()
    (reason,) = [missing(found, out)[broken]]
    assert "config.json" in reason and not (broken / "error.txt").exists()
    rows = rows_of(found, finished(collect(out), "main"))
    assert list(rows["MoR"].points) == [0] and list(rows["recursive"].points) == [0, 1]
    assert verdicts(judge(found, rows))["choosing"].startswith("not known yet"), "of one seed"


def test_figures_are_those_of_the_other_half_of_the_windows(asked):
    path, out = asked
    found = load_study(path)
    assert missing(found, out) == {}
    rows = rows_of(found, finished(collect(out), "main"))
    data = load_corpus(DataConfig(path="task:state-tracking?hops=3")).validation
    some = data.spread(8, 40)
    assert len(some) == 40

    model = checkpoint.load(out / "runs/recursive/seed-0").model
    nll = {d: measured(model, data, some[1::2], max_depth=d) for d in (1, 2)}
    curve = {depth: point["nll"] for depth, point in rows["recursive"].points[0].items()}
    assert list(curve) == [1.0, 1.5, 2.0, 3.0, "full"]
    assert (curve[1], curve[2], curve["full"]) == pytest.approx((nll[1], nll[2], nll[2]))
    assert curve[1.5] == pytest.approx((curve[1] + curve[2]) / 2) and nll[1] != nll[2]
    assert curve[3] not in (curve[1], curve[2]), "a recursion beyond the trained ones"

    model = checkpoint.load(out / "runs/MoR/seed-0").model
    calibrate(model, data, seq_len=8, max_windows=20, deepest=3)  # fits to every other of 40
    curve = rows["MoR"].points[0]
    for depth in (1.5, 2.0, "full"):
        expected = evaluate(model, _Chosen(data, some[1::2]), seq_len=8, depth=depth)
        assert curve[depth]["nll"] == pytest.approx(expected.nll)
        assert curve[depth]["mean_depth"] == pytest.approx(expected.mean_depth)
    shares = [rows[r].points[0][1.5]["share_per_recursion"] for r in ("MoR", "MoR, by random")]
    assert shares[1][:2] == pytest.approx(shares[0][:2], abs=0.1)

    once = rows["one pass"].points[0]
    assert list(once) == [1.0, "full"] and once[1.0]["nll"] == once["full"]["nll"]


def measured(model, data, indices, **settings):
    return evaluate(model, _Chosen(data, indices), seq_len=8, **settings).nll


CLAIM = "[[claims]]\nname = 'a'\nrow = 'recursive'\ndepths = [{}]\n{}"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("[choosers]\nrecursive = ['random']", "choosers stand in for a router that learns"),
        ("[choosers]\nx = ['random']", "'x' is none of recursive"),
        ("[choosers]\nrecursive = ['luck']", "'random', 'position'"),
        (CLAIM.format(1.5, "below = 0"), "two numbers or more"),
        (CLAIM.format("1, 7", "below = 0"), "a depth of 7"),
        (CLAIM.format("'fall'", "below = 0"), "'full'"),
        (CLAIM.format(1, "below = 0\nagainst = ['recursiv']"), "did you mean 'recursive'"),
        (CLAIM.format(1, "below = 0\nspent_within = 1"), "one of the two"),
        (CLAIM.format("'best'", "spent_within = 0.1"), "depths that are numbers"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main_runs(study(tmp_path, more, ASKED), tmp_path, {})


def test_nothing_is_asked_without_depths_and_some_variants_ask_for_their_own(tmp_path):
    assert curve_asked(study(tmp_path), "recursive") is None
    with pytest.raises(ValueError, match="name the depths"):
        study(tmp_path, MORE + DEPTHS)
    for depths in ("[2, 1]", "[0.5]"):
        with pytest.raises(ValueError, match="depths must grow, from 1 on"):
            study(tmp_path, base=ASKED.replace("[1, 1.5, 2, 3]", depths))
    some = variants_named(study(tmp_path, MORE + DEPTHS, ASKED), ["recursive"])
    assert curve_asked(some, "recursive") == dict(
        depths=[1.0, 1.5, 2.0, 3.0], windows=40, choosers=[]
    )


def test_the_studies_that_are_there_ask_for_what_their_rows_can_give():
    for file in sorted(Path("studies").glob("*.toml")):
        found = load_study(file)
        assert found.depths or file.stem == "isoflop-paper", file
    claims = load_study(Path("studies/elastic.toml")).claims
    assert sorted({claim.name[0] for claim in claims}) == list("12345")


def test_a_file_of_another_question_is_not_taken(tmp_path):
    write_json(tmp_path / CURVES, {"asked": {"depths": [1.0]}, "curves": {"": []}})
    assert read_curves(tmp_path, {"depths": [1.0]}) == {"": []}
    assert read_curves(tmp_path, {"depths": [1.0, 2.0]}) is None
