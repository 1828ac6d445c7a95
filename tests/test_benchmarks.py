"""The scripts behind published numbers run as printed, and their figures are right where these can
be known."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mor.cli import main
from mor.costs import flops as costs
from mor.generation import SamplingParams, generate
from mor.model.config import preset
from mor.model.random import hash_uniform
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


def test_convert_parity_finds_what_is_equal_and_what_is_not(folder, run_benchmark, monkeypatch):
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
    found = run_benchmark("convert_parity.py", *arguments)
    assert found["max_abs_difference"] < 1e-4 and found["weights_bit_equal_after_the_way_back"]
    assert found["greedy_prompts_equal"].startswith("8 of 8") and found["tokens"] == 80
    assert found["chat_template_equal"] and found["documents_with_other_ids_than_transformers"] == 0
    from mor import checkpoint

    def spoilt(path, load=checkpoint.load, **settings):
        loaded = load(path, **settings)
        loaded.model.final_norm.weight.data += 0.1
        return loaded

    monkeypatch.setattr(checkpoint, "load", spoilt)
    assert run_benchmark("convert_parity.py", *arguments)["max_abs_difference"] > 1e-2


def test_init_nll_measures_every_start(folder, run_benchmark):
    arguments = ["--windows", 2, "--seq-len", 40, "--threads", 1]
    rows = run_benchmark("init_nll.py", folder / "mor", folder / "text.jsonl", *arguments)["rows"]
    assert len(rows) == 26 and {row["init"] for row in rows[1:6]} == {
        "stepwise",
        "average",
        "lower",
        "upper",
        "random",
    }
    assert rows[0]["kind"] == "source" and rows[0]["layers"] == 8
    assert len({row["nll"] for row in rows}) > 20


def test_harness_parity_compares_two_checkpoints(folder, run_benchmark):
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
    found = run_benchmark("harness_parity.py", folder / "llama", folder / "mor", *arguments)
    (row,) = found["rows"]
    assert (
        row["first"] == row["second"]
        and row["items"] == 4
        and 0 <= found["largest_difference"] < 1e-4
    )


def test_data_prepare_measures_both_sides(folder, run_benchmark):
    arguments = ["--tokenizer", folder / "llama", "--megabytes", 0.001, "--rounds", 1]
    found = run_benchmark("data_prepare.py", folder / "text.jsonl", *arguments)
    assert (
        min(found["tokens_per_s"], found["bare_tokens_per_s"]) > 0 and found["peak_memory_mb"] > 10
    )


def test_train_speed_counts_the_flops_of_what_was_routed(run_benchmark, tmp_path):
    out = tmp_path / "speed.jsonl"
    arguments = ["--size", "tiny", "--batch", 4, "--rounds", 1, "--models", "mor-2", "--json"]
    arguments += ["--out", out]
    result = run_benchmark("train_speed.py", *arguments)
    shape = dict(num_layers=14, max_seq_len=64)
    flops = [
        costs.train_flops(preset("tiny", **shape, **other), 64)
        for other in ({}, dict(num_recursions=2, recipe="paper"))
    ]
    vanilla, mor = result["rows"]
    assert [vanilla["model"], mor["model"]] == ["vanilla", "mor-2"]
    assert mor["flop_ratio"] == pytest.approx(flops[1] / flops[0]) and mor["mean_depth"] == 1.5
    assert mor["time_over_flops"] == pytest.approx(mor["time_ratio"] / mor["flop_ratio"])
    assert mor["peak_mb"] < vanilla["peak_mb"]
    assert all(sum(row["split"].values()) == pytest.approx(1) for row in result["rows"])
    assert json.loads(out.read_text()) == result


def test_head_loss_sees_that_chunks_take_less_memory(run_benchmark, monkeypatch):
    monkeypatch.setattr("mor.model.loss.CHUNK_LOGITS", 1 << 21)
    tokens, vocab = 50, 80_000
    chunked, whole, *_ = run_benchmark(
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


@pytest.mark.slow
def test_decode_speed_compares_models_of_equal_depth(run_benchmark, tmp_path):
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
    found = run_benchmark("decode_speed.py", *SHORT, *parts, "--out", tmp_path / "speed.json")
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


def test_decode_speed_runs_the_same_requests_in_transformers(run_benchmark):
    rows = run_benchmark(
        "decode_speed.py", *SHORT, "--parts", "transformers", "--lengths.mean", 16
    )["transformers"]
    assert [row["who"] for row in rows] == ["engine", "generate", "continuous"] * 2
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_int8_reports_what_it_costs(folder, run_benchmark):
    arguments = ["--windows", 2, "--seq-len", 40, "--batches", 2, "--rounds", 1, "--seconds", 0.05]
    arguments += ["--threads", 1]
    found = run_benchmark("int8.py", folder / "mor", folder / "text.jsonl", *arguments)
    assert 0 < abs(found["nll"]["int8"] - found["nll"]["float32"]) < 0.05
    assert found["tokens_per_s"][0]["batch"] == 2 and found["tokens_per_s"][0]["speedup"] > 0


@pytest.fixture
def acceptance(monkeypatch):
    """The script as a module, its stages beside it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import acceptance_stages
    import gpu_acceptance

    return gpu_acceptance, acceptance_stages


def test_every_stage_of_the_acceptance_script_runs(acceptance, tmp_path, monkeypatch, capsys):
    """All in this process, where starting one for each takes longer than what it does."""
    script, stages = acceptance

    def inside(name, settings):
        results = []
        monkeypatch.setattr(stages.Bench, "_say", staticmethod(results.append))
        stages.run(name, settings.device, tiny=settings.tiny)
        yield from results

    arguments = ["--device", "cpu", "--tiny", "--out", tmp_path / "kept.jsonl"]
    monkeypatch.setattr(script, "run_outside", inside)
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    said = capsys.readouterr().out
    assert not ended.value.code, said
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    promises = [line for line in lines if line["holds"] is not None]
    assert all(line["holds"] for line in promises)
    stages = ["capture", "kernel", "gradients", "engine", "compiled", "training", "memory"]
    assert (
        list(dict.fromkeys(line["stage"] for line in promises if line["stage"] in stages)) == stages
    )
    ratios = [line for line in lines if line["stage"] in ("train_time", "decoding")]
    assert any(line["name"] == "mor-2: time over FLOPs" and line["value"] > 0 for line in ratios)
    assert any(line["name"] == "equal KV bytes: mor-4 over vanilla" for line in ratios)
    assert f"{len(promises)} of {len(promises)} promises hold" in said
    kept = (tmp_path / "kept.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == lines


@pytest.mark.slow  # two processes
def test_a_stage_of_the_acceptance_script_is_a_process_of_its_own():
    command = [sys.executable, BENCHMARKS / "gpu_acceptance.py", "--device", "cpu", "--tiny"]
    done = subprocess.run([*command, "--stage", "memory"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["holds"] for line in lines] == [None, True, None, True, None]


def test_the_acceptance_script_ends_in_nine_minutes_and_draws_weights_on_the_device(acceptance):
    """A model of the 360M shape takes 10 to 18 s to draw on the host."""
    _, stages = acceptance
    assert sum(stage.limit_s for stage in stages.STAGES.values()) <= 9 * 60
    meta = stages.Bench("decoding", torch.device("meta"), tiny=False)
    model = stages.decoder(meta, 3, torch.bfloat16)  # where it needs no memory, and no time
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def judged(stages, model, got, params, monkeypatch):
    said = []
    monkeypatch.setattr(stages.Bench, "_say", staticmethod(said.append))
    bench = stages.Bench("engine", torch.device("cpu"), tiny=True)
    stages.agreement(bench, "it", model, [got.prompt_ids], params, [got])
    return said[0].holds


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_another_token_is_excused_only_by_a_tie(temperature, acceptance, monkeypatch):
    _, stages = acceptance
    model = stages.small(stages.ROUTERS["expert"], "recursion_wise")
    params = SamplingParams(max_new_tokens=4, temperature=temperature, seed=1)
    answer = generate(model, [[5, 6, 7]], params)[0]
    assert judged(stages, model, answer, params, monkeypatch)
    other = dataclasses.replace(answer, token_ids=list(answer.token_ids))
    other.token_ids[2] = (other.token_ids[2] + 1) % stages.VOCAB
    assert not judged(stages, model, other, params, monkeypatch)


def test_how_near_a_tie_is(acceptance):
    _, stages = acceptance
    logits = torch.tensor([0.0, 1.0, 1.0 - 5e-4, -2.0])
    greedy, drawn = stages.GREEDY, SamplingParams(temperature=1.0, seed=3)
    gaps = [stages.token_gap(logits, greedy, 0, token) for token in range(4)]
    assert gaps == pytest.approx([1.0, 0.0, 5e-4, 3.0], abs=1e-6)
    # Place the draw at the border between two tokens, and well inside one.
    share = float(hash_uniform(torch.tensor(3), torch.tensor(0)))
    border = torch.tensor([share, 1 - share]).log() if share > 0.5 else None
    assert border is not None and stages.token_gap(border, drawn, 0, 0) < stages.NEAR_TIE
    assert stages.token_gap(border, drawn, 0, 1) < stages.NEAR_TIE
    inside = torch.tensor([share + 0.1, 0.9 - share]).log()
    assert stages.token_gap(inside, drawn, 0, 1) == float("inf")


@pytest.mark.parametrize("router", ["expert", "token", "random"])
def test_another_depth_is_excused_only_by_a_tie(router, acceptance, monkeypatch):
    _, stages = acceptance
    model = stages.small(stages.ROUTERS[router], "recursion_wise")
    params = SamplingParams(max_new_tokens=1, temperature=0)
    answer = generate(model, [[5, 6, 7]], params)[0]
    other = dataclasses.replace(answer, depths=[*answer.depths[:2], answer.depths[2] % 3 + 1])
    assert not judged(stages, model, other, params, monkeypatch)
    memory = model(torch.tensor([[5, 6, 7]])).routing
    if router == "expert":
        model.router.threshold_R[1] = memory.steps[1].decision.causal_logit[-1].sigmoid()
    elif router == "token":
        model.router.bias_R -= memory.memory["score"][-1]
    answer = generate(model, [[5, 6, 7]], params)[0]
    other = dataclasses.replace(answer, depths=[*answer.depths[:2], answer.depths[2] % 3 + 1])
    assert judged(stages, model, other, params, monkeypatch) == (router != "random")


def test_the_host_has_what_the_replays_leave_of_a_turn(acceptance, monkeypatch):
    """Not the difference of a lone replay's wall time to a step's, which are measured apart."""
    _, stages = acceptance
    now = [0.0]
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])

    class Graph:
        def __init__(self, seconds):
            self.own_s, self.spent_s = seconds, 0.0

        def replay(self):
            now[0] += self.own_s
            self.spent_s += self.own_s

        def seconds(self):
            return self.spent_s

    steps = SimpleNamespace(graphs={"launch": 3.0, 2: 1.0})
    before = dict(steps.graphs)

    def turn(seconds):
        for key in ("launch", 2, "launch"):
            steps.graphs[key].replay()
            now[0] += 0.5

    load = SimpleNamespace(turn=turn, engine=SimpleNamespace(strategy=SimpleNamespace(steps=steps)))
    assert stages.host_share(load, 1.0, Graph) == pytest.approx(1.5 / 8.5)
    assert steps.graphs == before


def test_a_stage_that_dies_or_hangs_is_a_broken_promise(acceptance, monkeypatch):
    script, _ = acceptance
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
