"""Studies: the grid they ask for, runs that survive kills and failures, what the table says."""

import json
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import mor.training.loop as train_module
from mor.analysis.early_exit import (
    POLICIES,
    confident_exits,
    early_exits,
    oracle_exits,
    random_exits,
)
from mor.cli import main
from mor.data.stream import DataConfig, load_corpus
from mor.evaluation.nll import evaluate
from mor.model.config import preset
from mor.model.transformer import Transformer
from mor.statistics import paired
from mor.studies import compare
from mor.studies.launch import launch, run_one, visible_gpus
from mor.studies.results import collect, tuned_rates
from mor.studies.settings import Workers
from mor.studies.study import load_study, main_runs, merge, study_rows, tuning_runs
from mor.training.config import step_flops
from mor.training.optim import learning_rate

BASE = """
title = "Test"
seeds = [0, 1]
reference = "recursive"
depth_pays = { deep = "recursive", shallow = "one pass" }
windows = 8

[base]
steps = 4
seq_len = 8
batch_size = 2
eval_every = 2
eval_windows = 4
log_every = 1
device = "cpu"
data.path = "task:state-tracking?hops=3"
model.preset = "tiny"
model.dim = 16
model.num_heads = 2
model.num_kv_heads = 2
model.head_dim = 8
model.ffn_dim = 24
model.max_seq_len = 32

[variants.recursive]
model = { num_layers = 4, num_recursions = 2 }
[variants."one pass"]
model = { num_layers = 3 }
"""
QUIET = Console(quiet=True)


def study_file(tmp_path, more="", base=BASE):
    path = tmp_path / "study.toml"
    path.write_text(base + more)
    return path


def study(tmp_path, more="", base=BASE):
    return load_study(study_file(tmp_path, more, base))


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


def test_paired_differences_and_their_intervals():
    # Differences 0.1, 0.2, 0.3: mean 0.2, sd 0.1, and Student's t for 2 degrees of freedom is
    # 4.303.
    found = paired({0: 1.1, 1: 2.2, 2: 3.3, 9: 7.0}, {0: 1.0, 1: 2.0, 2: 3.0, 8: 1.0})
    half = 4.302653 * 0.1 / 3**0.5
    assert found.count == 3 and abs(found.mean - 0.2) < 1e-9
    assert abs(found.low - (0.2 - half)) < 1e-6 and abs(found.high - (0.2 + half)) < 1e-6
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert paired({0: 1.5}, {0: 1.0}).low is None


def runs_of(**nll):
    return [
        dict(
            row=row.replace("_", " "),
            variant=row.replace("_", " "),
            budget=None,
            seed=seed,
            validation_nll=value,
        )
        for row, values in nll.items()
        for seed, value in enumerate(values)
    ]


def test_the_verdict_on_depth_follows_from_the_numbers(tmp_path):
    found = study(tmp_path)
    pays = compare.depth_verdict(
        found, runs_of(recursive=[1.0, 1.1, 1.2], one_pass=[1.4, 1.5, 1.61])
    )
    assert "depth pays" in pays and "+0.403" in pays
    noisy = compare.depth_verdict(
        found, runs_of(recursive=[1.0, 1.1, 1.2], one_pass=[1.0, 1.5, 1.3])
    )
    assert "says nothing about routing" in noisy
    assert "one seed" in compare.depth_verdict(found, runs_of(recursive=[1.0], one_pass=[2.0]))
    assert "not finished" in compare.depth_verdict(found, runs_of(recursive=[1.0]))


def test_exits_keep_the_mean_depth_and_an_oracle_knows_best():
    generator = torch.Generator().manual_seed(0)
    # deeper is better
    nll = torch.rand(4000, 3, generator=generator, dtype=torch.float64).cumsum(1).flip(1)
    sure = (-nll).exp()
    losses = {}
    for name, policy in POLICIES.items():
        depth = policy(nll, sure, 2.0)
        assert depth.min() >= 1 and depth.max() <= 3 and abs(depth.double().mean() - 2.0) < 0.03, (
            name
        )
        losses[name] = nll.gather(1, depth[:, None] - 1).mean()
    assert losses["oracle"] < losses["confidence"] < losses["random"]
    # Where every further recursion hurts, an oracle stays at one.
    assert (oracle_exits(nll.flip(1), sure, 2.0) == 1).all()
    assert torch.equal(confident_exits(nll, sure, 3.0), torch.full((4000,), 3))
    assert torch.equal(random_exits(nll, sure, 2.0), random_exits(-nll, sure + 1, 2.0)), (
        "knows nothing of the tokens"
    )


def test_exits_are_measured_at_every_depth_of_the_model():
    data = load_corpus(DataConfig(path="task:state-tracking")).validation
    config = preset("tiny", vocab_size=15, num_recursions=3, router="fixed")
    model = Transformer(config).init_weights().eval()
    found = early_exits(model, data, 20, 32)
    caps = [evaluate(model, data, seq_len=20, max_windows=32, max_depth=r).nll for r in (1, 2, 3)]
    assert found["fixed"] == pytest.approx(caps, abs=1e-5) and found["mean_depth"] == 2
    assert found["oracle"]["nll"] < min(caps) and found["oracle"]["mean_depth"] <= 2.01
    assert abs(found["confidence"]["mean_depth"] - 2) < 0.05


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


FOLDER = Path(__file__).parents[1] / "studies"
STUDIES = sorted(FOLDER.glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_ready_study_can_be_planned_at_every_size(path, tmp_path):
    assert STUDIES
    for size in (None, *FOLDER.glob("sizes/*.toml")):
        found = load_study(path, size=size)
        assert (
            len(found.seeds) >= 3
            and found.depth_pays.deep
            and found.depth_pays.shallow
            and found.reference
        )
        if found.budgets and size is not None:
            continue  # budgets and sizes belong together
        runs = [run for stage in main_runs(found, tmp_path, {}) for run in stage]
        assert len({run.config.out for run in runs}) == len(runs) > 0
