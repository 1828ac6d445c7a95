"""Studies: the grid they ask for, and mistakes in their files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mor.model.config import ModelConfig
from mor.studies.launch import run_one
from mor.studies.results import model_facts
from mor.studies.study import load_study, main_runs, merge, study_rows
from mor.training.config import step_flops
from mor.training.optim import learning_rate
from tests.studies.small_study import BASE, study, study_file


def test_every_variant_meets_every_value_of_every_axis(tmp_path):
    more = """
[axes]
"optim.lr" = [1e-3, 2e-3]
size = { s = { model.dim = 16 }, l = { model.dim = 32, batch_size = 3 } }
"""
    rows = {row.name: row.config for row in study_rows(study(tmp_path, more))}
    assert len(rows) == 8
    config = rows["recursive, lr 0.002, size l"]
    assert (config.optim.lr, config.model.dim, config.batch_size, config.model.num_recursions) == (
        2e-3,
        32,
        3,
        2,
    )
    assert (config.model.prelude_layers, config.model.shared_layers, config.model.coda_layers) == (
        1,
        1,
        1,
    )
    assert rows["one pass, lr 0.001, size s"].model.family == "vanilla"
    runs = main_runs(study(tmp_path, more), tmp_path, {"recursive, lr 0.002, size l": 7e-3})[0]
    assert len(runs) == 16 and len({run.config.out for run in runs}) == 16
    assert {run.config.optim.lr for run in runs if run.row == "recursive, lr 0.002, size l"} == {
        7e-3
    }


def test_nested_tables_merge_and_inputs_stay_as_they_are():
    base = {"model": {"dim": 8, "router": {"kind": "random"}}, "steps": 3}
    merged = merge(base, {"model": {"router": {"seed": 1}}}, {"steps": 4})
    assert merged == {"model": {"dim": 8, "router": {"kind": "random", "seed": 1}}, "steps": 4}
    assert base["model"]["router"] == {"kind": "random"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("[variants.x]\nmodel.num_recursion = 2", "variant 'x'.*did you mean 'num_recursions'"),
        ("[variants.x]\nmodel.num_layers = 5\nmodel.num_recursions = 2", "nearest valid"),
        ("[variants.x]\nstep = 3", "did you mean 'steps'"),
        ("[tuning]\nrates = [1e-3]\nseed = 1", "one of the seeds that count"),
        ("[tunning]\nrates = [1e-3]", "did you mean 'tuning'"),
    ],
)
def test_a_wrong_study_is_explained(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        study_rows(study(tmp_path, more))
    with pytest.raises(ValueError, match="'deep one' is none of recursive, one pass"):
        study(tmp_path, base=BASE.replace('deep = "recursive"', 'deep = "deep one"'))


BUDGETS = "budgets = [5e7, 1e8, 1.5e8]\n" + BASE


def test_budgets_share_a_stable_run_and_get_their_flops(tmp_path):
    found = study(tmp_path, base=BUDGETS)
    trunks, branches = main_runs(replace(found, seeds=(0,)), tmp_path / "out", {})
    trunks, branches = (
        [r for r in stage if r.variant == "recursive"] for stage in (trunks, branches)
    )
    assert [r.budget for r in trunks] == [1.5e8] and [r.budget for r in branches] == [5e7, 1e8]
    early = run_one(branches[0], 1)
    assert early.status == "failed" and "did it finish?" in early.reason
    for run in (*trunks, *branches):
        assert run_one(run, 1).status == "finished", run
    step = step_flops(trunks[0].config, 0)
    for run in (*trunks, *branches):
        result = json.loads((Path(run.config.out) / "result.json").read_text())
        assert abs(result["train_flops"] - run.budget) <= step / 2
    config = branches[0].config
    rates = [
        learning_rate(config.optim, s, config.steps)
        for s in range(branches[0].branch_step, config.steps)
    ]
    assert (
        rates == sorted(rates, reverse=True)
        and rates[0] <= config.optim.lr
        and rates[-1] < rates[0]
    )


def test_every_seed_draws_its_own_random_depths(tmp_path):
    routed = study(
        tmp_path,
        '[variants.random]\nmodel = { num_recursions = 2, router = { kind = "random" } }\n',
    )
    runs = main_runs(routed, tmp_path / "out", {})[0]
    drawn = [(run.config.seed, run.config.model.router.seed) for run in runs if run.row == "random"]
    assert drawn == [(seed, seed) for seed in routed.seeds] and len(drawn) > 1
    assert {run.config.model.router.seed for run in runs if run.row != "random"} == {0}


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


FOLDER = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_the_control_of_depth_has_the_parameters_of_the_deep_model(path):
    for size in (None, *FOLDER.glob("sizes/*.toml")):
        study, params = load_study(path, size=size), {}
        if study.budgets and size is not None:
            continue  # budgets and sizes belong together
        for row in study_rows(study):
            params.setdefault(tuple(row.labels.items()), {})[row.variant] = model_facts(
                row.config.model
            )["params"]
        for place, by_variant in params.items():
            assert by_variant[study.depth_pays.deep] == by_variant[study.depth_pays.shallow], (
                size,
                place,
            )


def test_a_variant_may_differ_at_one_value_of_an_axis_that_there_is(ran):
    study = replace(
        ran[0], axes={"width": {"narrow": {"model": {"dim": 16}}, "wide": {"model": {"dim": 32}}}}
    )
    other = {
        **study.variants,
        "MoR": {**study.variants["MoR"], "at": {"wide": {"model": {"num_layers": 8}}}},
    }
    layers = {
        row.name: row.config.model.shared_layers
        for row in study_rows(replace(study, variants=other))
    }
    assert layers == {
        f"{v}, width {w}": 1 + (v == "MoR" and w == "wide")
        for v in study.variants
        for w in study.axes["width"]
    }
    other["MoR"]["at"] = {"huge": {}}
    with pytest.raises(ValueError, match="no axis has the value 'huge'"):
        study_rows(replace(study, variants=other))
