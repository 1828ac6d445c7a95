"""The scripts behind published numbers run as printed, and their figures are right where these can
be known."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mor.cli import main
from mor.costs import flops as costs
from mor.model.config import preset
from tests.small_llama import save_llama
from tests.test_flat_tasks import FLAT

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama directory, what mor makes of it, and text."""
    path = tmp_path_factory.mktemp("benchmarks")
    save_llama(path / "llama")
    main(["convert", str(path / "llama"), str(path / "mor")])
    texts = (f"The square of {i} is {i * i}. " * 4 for i in range(30))
    (path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (path / "piqa_val.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in FLAT["piqa_val"])
    )
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    def run(script, *arguments):
        monkeypatch.syspath_prepend(BENCHMARKS)  # as where a script is started
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_convert_parity_finds_what_is_equal_and_what_is_not(folder, run, monkeypatch):
    arguments = [
        folder / "llama",
        folder / "text.jsonl",
        "--windows",
        2,
        "--seq-len",
        40,
        "--new-tokens",
        5,
    ]
    found = run("convert_parity.py", *arguments)
    assert found["max_abs_difference"] < 1e-4 and found["weights_bit_equal_after_the_way_back"]
    assert found["greedy_prompts_equal"].startswith("8 of 8") and found["tokens"] == 80
    assert found["chat_template_equal"] and found["documents_with_other_ids_than_transformers"] == 0
    from mor import checkpoint

    def spoilt(path, load=checkpoint.load, **settings):
        loaded = load(path, **settings)
        loaded.model.final_norm.weight.data += 0.1
        return loaded

    monkeypatch.setattr(checkpoint, "load", spoilt)
    assert run("convert_parity.py", *arguments)["max_abs_difference"] > 1e-2


def test_init_nll_measures_every_start(folder, run):
    arguments = ["--windows", 2, "--seq-len", 40, "--threads", 1]
    rows = run("init_nll.py", folder / "mor", folder / "text.jsonl", *arguments)["rows"]
    assert len(rows) == 26 and {row["init"] for row in rows[1:6]} == {
        "stepwise",
        "average",
        "lower",
        "upper",
        "random",
    }
    assert rows[0]["kind"] == "source" and rows[0]["layers"] == 8
    assert len({row["nll"] for row in rows}) > 20


def test_harness_parity_compares_two_checkpoints(folder, run):
    arguments = [
        "--task-data",
        folder,
        "--tasks",
        "piqa",
        "--limit",
        4,
        "--batch-sizes",
        3,
        2,
        "--threads",
        1,
    ]
    found = run("harness_parity.py", folder / "llama", folder / "mor", *arguments)
    (row,) = found["rows"]
    assert (
        row["first"] == row["second"]
        and row["items"] == 4
        and 0 <= found["largest_difference"] < 1e-4
    )


def test_data_prepare_measures_both_sides(folder, run):
    arguments = ["--tokenizer", folder / "llama", "--megabytes", 0.001, "--rounds", 1]
    found = run("data_prepare.py", folder / "text.jsonl", *arguments)
    assert (
        min(found["tokens_per_s"], found["bare_tokens_per_s"]) > 0 and found["peak_memory_mb"] > 10
    )


def test_train_speed_counts_the_flops_of_what_was_routed(run, tmp_path):
    out = tmp_path / "speed.jsonl"
    arguments = ["--batch", 1, "--rounds", 1, "--models", "mor-2", "--json", "--out", out]
    result = run("train_speed.py", *arguments)
    shape = dict(num_layers=14, max_seq_len=512)
    flops = [
        costs.train_flops(preset("mini", **shape, **other), 512)
        for other in ({}, dict(num_recursions=2, recipe="paper"))
    ]
    vanilla, mor = result["rows"]
    assert [vanilla["model"], mor["model"]] == ["vanilla", "mor-2"]
    assert mor["flop_ratio"] == pytest.approx(flops[1] / flops[0]) and mor["mean_depth"] == 1.5
    assert mor["time_over_flops"] == pytest.approx(mor["time_ratio"] / mor["flop_ratio"])
    assert mor["peak_mb"] < vanilla["peak_mb"]
    assert all(sum(row["split"].values()) == pytest.approx(1) for row in result["rows"])
    assert json.loads(out.read_text()) == result


def test_head_loss_sees_that_chunks_take_less_memory(run):
    tokens, vocab = 500, 80_000
    chunked, whole, *_ = run(
        "head_loss.py", "--tokens", tokens, "--dim", 8, "--vocab", vocab, "--rounds", 1
    )["rows"]
    assert whole["peak_mb"] > 2 * 4 * tokens * vocab / 1e6 > chunked["peak_mb"]


SHORT = [
    "--preset",
    "tiny",
    "--num-layers",
    14,
    "--lengths.mean",
    6,
    "--lengths.deviation",
    2,
    "--rounds",
    1,
    "--threads",
    1,
]


def test_decode_speed_compares_models_of_equal_depth(run, tmp_path):
    parts = [
        "--parts",
        "models",
        "batching",
        "overhead",
        "--batches",
        2,
        "--seconds",
        0.05,
        "--json",
    ]
    found = run("decode_speed.py", *SHORT, *parts, "--out", tmp_path / "speed.json")
    assert json.loads((tmp_path / "speed.json").read_text()) == found
    rows = found["rows"]
    assert [row["model"] for row in rows] == ["vanilla", "mor-2", "mor-3", "mor-4"] * 2
    assert [row["batch"] for row in rows[:4]] == [2] * 4 and [row["slots"] for row in rows[:5]] == [
        4,
        4,
        4,
        4,
        2,
    ]
    assert rows[0]["speedup"] == rows[0]["limit"] == rows[4]["speedup"] == 1
    for recursions, row in enumerate(rows[1:4], start=2):
        shape = preset("tiny", num_recursions=recursions, num_layers=14, router="random")
        assert row["kv_bytes_per_token"] == costs.kv_bytes(shape, 1, shape.capacities, 4)
        assert row["limit"] > 1 and row["share_of_limit"] == pytest.approx(
            row["speedup"] / row["limit"]
        )
    for row in rows[5:]:  # as many slots as the bytes of the baseline's two hold
        assert row["slots"] == int(2 * rows[4]["kv_bytes_per_token"] / row["kv_bytes_per_token"])
    assert [row["batching"] for row in found["batching"]][2:4] == ["lock-step", "static"]
    assert [row["slots"] for row in found["overhead"]] == [1, 8, 32, 128, 512]
    assert all(
        0 < row["share"] < 1 and sum(row["parts"].values()) == pytest.approx(1)
        for row in found["overhead"]
    )


def test_decode_speed_runs_the_same_requests_in_transformers(run):
    rows = run("decode_speed.py", *SHORT, "--parts", "transformers", "--lengths.mean", 16)[
        "transformers"
    ]
    assert [row["who"] for row in rows] == ["engine", "generate", "continuous"] * 2
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_int8_reports_what_it_costs(folder, run):
    arguments = ["--windows", 2, "--seq-len", 40, "--batches", 2, "--rounds", 1, "--seconds", 0.05]
    arguments += ["--threads", 1]
    found = run("int8.py", folder / "mor", folder / "text.jsonl", *arguments)
    assert 0 < abs(found["nll"]["int8"] - found["nll"]["float32"]) < 0.05
    assert found["tokens_per_s"][0]["batch"] == 2 and found["tokens_per_s"][0]["speedup"] > 0


def acceptance(*arguments):
    command = [sys.executable, BENCHMARKS / "gpu_acceptance.py", "--device", "cpu", "--tiny"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done, lines


def test_every_stage_of_the_acceptance_script_runs(tmp_path):
    done, lines = acceptance("--out", tmp_path / "kept.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    promises = [line for line in lines if line["holds"] is not None]
    assert all(line["holds"] for line in promises)
    stages = ["capture", "kernel", "gradients", "engine", "compiled", "training", "memory"]
    assert (
        list(dict.fromkeys(line["stage"] for line in promises if line["stage"] in stages)) == stages
    )
    ratios = [line for line in lines if line["stage"] in ("train_time", "decoding")]
    assert any(line["name"] == "mor-2: time over FLOPs" and line["value"] > 0 for line in ratios)
    assert any(line["name"] == "equal KV bytes: mor-4 over vanilla" for line in ratios)
    assert f"{len(promises)} of {len(promises)} promises hold" in done.stdout
    kept = (tmp_path / "kept.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == lines


def test_a_stage_that_dies_or_hangs_is_a_broken_promise(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_acceptance as script

    settings = script.Settings(device="cpu", tiny=True)
    monkeypatch.setitem(script.STAGES, "memory", script.STAGES["memory"]._replace(limit_s=0))
    hung, _ = script.run_outside("memory", settings)
    assert hung.holds is False and "stopped after 0 s" in hung.detail
    dead, _ = script.run_outside("kernel", script.Settings(device="nowhere", tiny=True))
    assert dead.holds is False and "exit code 1" in dead.detail and "nowhere" in dead.detail


@pytest.mark.slow  # two processes
def test_serve_speed_measures_every_part():
    flags = ["--preset", "tiny", "--concurrent", "2", "--turns", "1", "--new", "2"]
    flags += ["--rounds", "1", "--requests", "40"]
    command = [sys.executable, str(BENCHMARKS / "serve_speed.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["throughput"]["streamed_ratio"] > 0 and found["first_token"]["server_ms"] > 0
    assert 0 < found["masks"]["share"] < 1 and len(found["memory"]["resident_mb"]) == 10
