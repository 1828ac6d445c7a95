"""What a study says of its runs, against the runs themselves."""

import shutil
from pathlib import Path
from statistics import fmean

import pytest

from mor import checkpoint
from mor.analysis.early_exit import (
    early_exits,
)
from mor.data.config import DataConfig
from mor.data.corpus import load_corpus
from mor.evaluation.nll import evaluate
from mor.files import read_json, write_json
from mor.model.config import RouterConfig, preset
from mor.run_folder import RunFolder
from mor.studies.launch import run_one
from mor.studies.results import collect, finished, model_facts, tuned_rates
from mor.studies.study import main_runs, tuning_runs
from mor.training.config import load_config
from tests.conftest import tiny
from tests.studies.small_study import of, study


def test_learning_rates_are_tuned_on_short_runs_of_another_seed(tmp_path):
    found = study(tmp_path, "[tuning]\nrates = [1e-6, 1e-2]\nshare = 0.5\n")
    runs = tuning_runs(found, tmp_path / "out")
    assert len(runs) == 4 and {(r.config.steps, r.config.seed, r.stage) for r in runs} == {
        (2, 1000, "tuning")
    }
    for run in runs:
        assert run_one(run, 1).status == "finished"
    rates = tuned_rates(collect(tmp_path / "out"), (1e-6, 1e-2))
    assert rates == {"recursive": 1e-2, "one pass": 1e-2}, "a rate of 1e-6 learns nothing"
    assert set(tuned_rates(collect(tmp_path / "out"), (1e-6,)).values()) == {1e-6}, (
        "rates no longer in the file do not count"
    )


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


def test_the_figure_that_counts_is_causal_and_top_k_has_its_own(ran):
    _, _, rows = ran
    for row in of(rows, "main", "branch"):
        model, path = checkpoint.load(row["path"]).model.eval(), row["path"]
        config = load_config(RunFolder(Path(path)).settings)
        data = load_corpus(config.data).validation
        causal, topk = (
            evaluate(model, data, seq_len=16, max_windows=16, selection=name)
            for name in ("threshold", "topk")
        )
        assert row["validation_nll"] == pytest.approx(causal.nll, abs=1e-6)
        assert row["mean_depth"] == pytest.approx(causal.mean_depth)
        if row["variant"] == "MoR":
            assert row["topk_nll_noncausal"] == pytest.approx(topk.nll, abs=1e-6)
            assert abs(topk.nll - causal.nll) > 1e-5, "or this test could not fail"
        else:
            assert row["topk_nll_noncausal"] is None


def test_router_health_is_that_of_the_last_tenth_of_training(ran):
    for row in of(ran[2], "main"):
        if row["variant"] == "MoR":
            log = [x for x in RunFolder(Path(row["path"])).read_metrics() if "loss" in x]
            last = log[-(len(log) // 10) :]
            assert len(log) >= 20 and row["depth_entropy"] == pytest.approx(
                fmean(x["depth_entropy"] for x in last)
            )
            assert row["agreement"] == pytest.approx(fmean(x["agreement"] for x in last))
            assert row["agreement"] != log[0]["agreement"], "or this test could not fail"


def test_parameters_are_those_of_the_model_and_its_shared_stack(ran):
    for row in of(ran[2], "main"):
        model = checkpoint.load(row["path"]).model
        own, shared = (
            sum(p.numel() for p in part.parameters())
            for part in (model, model.recursions.shared_blocks)
        )
        assert (
            row["params"] == own - model.embedding.weight.numel() and row["looped_params"] == shared
        )
    assert model_facts(preset("tiny"))["looped_params"] == 0, "one pass loops nothing"


def test_exits_are_measured_on_the_variants_asked_for_at_their_own_mean_depth(ran):
    runs = finished(ran[2], "main", "branch")
    assert {run["variant"] for run in runs if run.get("exits")} == {"MoR"} and len(runs) == 8
    for run in (run for run in runs if run["variant"] == "MoR"):
        found = run["exits"]
        assert found["mean_depth"] == pytest.approx(1 + 2 / 3 + 1 / 3)
        assert found["confidence"]["mean_depth"] == pytest.approx(2, abs=0.01)
        assert found["oracle"]["nll"] <= found["confidence"]["nll"] + 1e-6
    data = load_corpus(DataConfig(path="task:state-tracking?hops=3")).validation
    for router, mean_depth in (
        ("fixed", 2.0),
        (RouterConfig(kind="random", capacities=(1.0, 0.5, 0.25)), 1.75),
    ):
        assert early_exits(tiny(router, vocab_size=15), data, 16, 4)["mean_depth"] == pytest.approx(
            mean_depth
        )
