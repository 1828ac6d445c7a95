"""What a study says of its runs, against figures worked out by hand, by definition, or from the
runs themselves."""

import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import random_tokens, tiny
from rich.console import Console

import mor.studies.launch as launch_module
from mor import checkpoint
from mor.analysis.early_exit import all_to_depth, confident_exits, early_exits, oracle_exits
from mor.data.stream import DataConfig, load_corpus
from mor.evaluation.nll import by_hops, evaluate
from mor.model.config import RouterConfig, preset
from mor.model.transformer import Transformer
from mor.run_folder import RunFolder
from mor.studies import compare
from mor.studies.launch import flops_of, run_one, run_study
from mor.studies.report import exits
from mor.studies.results import collect, finished, model_facts
from mor.studies.settings import Workers
from mor.studies.study import DepthPays, Study, load_study, main_runs, study_rows, tuning_runs
from mor.training.config import load_config

STUDY = """
title = "Test"
seeds = [0, 1]
reference = "recursive"
budgets = [6e7, 1.2e8]
exits = ["MoR"]
windows = 16
tuning = { rates = [1e-6, 1e-2], share = 0.5 }
axes.width = { narrow = { model.dim = 16 } }
depth_pays = { deep = "recursive", shallow = "recursive" }

[base]
steps = 1
seq_len = 16
batch_size = 4
log_every = 1
device = "cpu"
data.path = "task:state-tracking?hops=3"
optim = { warmup = 0.2 }

[base.model]
preset = "tiny"
num_layers = 5
num_recursions = 3
num_heads = 2
num_kv_heads = 2
head_dim = 8
ffn_dim = 24
max_seq_len = 16

[variants.recursive]
[variants.MoR.model.router]
kind = "expert_choice"
alpha = 1.0
gate = "residual"
"""
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
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


def planned(ran, out=None):
    """Trunks and branches, with the rates that the runs were tuned to."""
    study, folder, rows = ran
    rates = {row["row"]: row["config_optim_lr"] for row in rows if row["stage"] == "main"}
    return main_runs(study, out or folder, rates)


def of(rows, *stages):
    return [row for row in rows if row["stage"] in stages]


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


HAND = Study(
    title="",
    variants={"a": {}, "ab": {}, "b": {}},
    reference="a",
    depth_pays=DepthPays(deep="ab", shallow="b"),
)


def hand_runs():
    """By size and budget: a, ab worse by 0.5, 0.51 and 0.52, and b worse by 1 at size s and better
    by 1 at size l."""
    for size, extra in (("s", 1.0), ("l", -1.0)):
        for budget in (1e3, 1e6):
            for seed in range(3):
                base = 10 * (budget == 1e6) + 5 * (size == "l") + 0.1 * seed + 3
                for variant, nll in (
                    ("a", base),
                    ("ab", base + 0.5 + 0.01 * seed),
                    ("b", base + 0.5 + extra),
                ):
                    yield dict(
                        row=f"{variant}, size {size}",
                        variant=variant,
                        budget=budget,
                        seed=seed,
                        validation_nll=nll,
                        mean_depth=1 + seed,
                        params=1,
                        tokens=1,
                        train_flops=1,
                        train_s=1,
                        config_optim_lr=1,
                    )


def test_rows_are_compared_with_the_reference_at_the_same_place():
    lines = {line.row: line for line in compare.lines(HAND, hand_runs())}
    assert len(lines) == 12
    for place in (
        "size s, 1000 FLOPs",
        "size s, 1e+06 FLOPs",
        "size l, 1000 FLOPs",
        "size l, 1e+06 FLOPs",
    ):
        worse = lines[f"ab, {place}"]
        half = 4.302653 * 0.01 / 3**0.5  # Student's t for 2 degrees of freedom
        assert (
            worse.difference == pytest.approx(0.51) and worse.mean_depth == 2 and worse.seeds == 3
        )
        assert (worse.difference_low, worse.difference_high) == (
            pytest.approx(0.51 - half),
            pytest.approx(0.51 + half),
        )
        assert lines[f"b, {place}"].difference == pytest.approx(1.5 if "size s" in place else -0.5)
        assert lines[f"a, {place}"].difference is None and lines[
            f"a, {place}"
        ].nll_sd == pytest.approx(0.1)
    assert lines["a, size l, 1e+06 FLOPs"].nll == pytest.approx(18.1)


def test_depth_is_judged_at_every_place():
    verdicts = compare.depth_verdict(HAND, list(hand_runs())).splitlines()
    assert [verdict.split(": ")[0] for verdict in verdicts] == [
        f"ab, size {size}, {budget} FLOPs" for size in "sl" for budget in ("1000", "1e+06")
    ]
    assert all("depth pays: " in v and "+0.990" in v for v in verdicts[:2])
    assert all("does not clearly pay" in v and "-1.010" in v for v in verdicts[2:])


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


@torch.inference_mode()
def test_every_token_goes_as_deep_as_it_is_sent():
    tokens = random_tokens(2, 11)
    chosen = tiny("token_choice")
    for depth in (1, 2, 3):
        for kind in ("fixed", "expert_choice", "random"):
            model = tiny(kind)
            expected = model(tokens, capacities=(1.0,) * 3, max_depth=depth).logits_BTV
            torch.testing.assert_close(
                all_to_depth(model, tokens, depth), expected, atol=1e-4, rtol=1e-4
            )
        sent = all_to_depth(chosen, tokens, depth)
        # it gates nothing
        chosen.router.bias_R[:] = torch.where(torch.arange(3) == depth - 1, 99.0, 0.0)
        expected = chosen(tokens)
        assert (expected.routing.depth_BT == depth).all()
        torch.testing.assert_close(sent, expected.logits_BTV, atol=1e-4, rtol=1e-4)
        chosen.router.bias_R.zero_()


def test_equal_probabilities_are_shared_out_until_the_mean_depth_is_met():
    hard = torch.arange(4000) % 10 < 3
    sure = torch.where(hard[:, None] & (torch.arange(4) < 3), 0.5, 1.0).double()
    nll = -(sure * 0.999).log()
    for mean_depth in (1.5, 2.5, 3.9):
        depth = confident_exits(nll, sure, mean_depth)
        assert depth.double().mean() == pytest.approx(mean_depth, abs=0.001)
        assert (
            depth.min() >= 1
            and depth.max() <= 4
            and torch.equal(depth, confident_exits(nll, sure, mean_depth))
        )
    assert (confident_exits(nll, sure, 2.5)[hard] == 4).all(), (
        "sure tokens go deeper only when all others do"
    )
    assert oracle_exits(nll, sure, 1.5).double().mean() == pytest.approx(1.5, abs=0.001)


@pytest.mark.parametrize(
    "measure", [lambda *a: early_exits(*a), lambda *a: by_hops(*a)], ids=["exits", "hops"]
)
def test_batches_go_where_the_model_is(measure, monkeypatch):
    def forward(self, tokens_BT, **settings):
        raise LookupError(tokens_BT.device.type)

    monkeypatch.setattr(Transformer, "forward", forward)
    data = load_corpus(DataConfig(path="task:state-tracking")).validation
    with pytest.raises(LookupError, match="meta"):
        measure(tiny(vocab_size=15).to("meta"), data, 16, 4)


@pytest.mark.gpu
def test_cuda_gives_the_exits_and_hops_of_the_cpu():
    data = load_corpus(DataConfig(path="task:state-tracking")).validation
    for kind in ("expert_choice", "token_choice"):
        model = tiny(kind, vocab_size=15)
        found, hops = early_exits(model, data, 16, 32), by_hops(model, data, 16, 32)
        there, hops_there = early_exits(model.cuda(), data, 16, 32), by_hops(model, data, 16, 32)
        assert there["fixed"] == pytest.approx(found["fixed"], abs=1e-4)
        assert there["oracle"]["nll"] == pytest.approx(found["oracle"]["nll"], abs=1e-3)
        assert hops_there["answers_right"] == pytest.approx(hops["answers_right"], abs=0.01)


FOLDER = Path(__file__).parents[1] / "studies"


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


def test_runs_of_moves_are_of_all_lengths_equally_often():
    problems = load_corpus(DataConfig(path="task:state-tracking?hops=4")).train.problems(
        range(400), 40
    )
    hops = problems.hops_BT[:, :-1]
    ends = problems.hops_BT[:, 1:] == 1  # the next word sets the state anew
    share = torch.bincount(hops[ends], minlength=5)[1:] / ends.sum()
    assert share.tolist() == pytest.approx([0.25] * 4, abs=0.03)
