"""The scripts behind the figures of deepened models run, and their figures are right where these
can be known."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from mor import checkpoint
from mor.cli import main
from mor.data.corpus import load_tokens
from mor.evaluation.calibrate import calibrate
from tests.small_llama import save_llama

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained model and text of two kinds."""
    path = tmp_path_factory.mktemp("deepen")
    save_llama(path / "llama")
    main(["convert", str(path / "llama"), str(path / "smol")])
    rows = [
        {"text": f"The square of {i} is {i * i}. " * 9, "kind": "even" if i % 2 else "odd"}
        for i in range(12)
    ]
    (path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def deepened(folder):
    """Deepened, with numbers in place of every zero, and calibrated."""
    deepen = ["--deepen", "--block", "2:5", "--num-recursions", "2", "--adapter", "lora:3"]
    main(["convert", str(folder / "llama"), str(folder / "zero"), *deepen])
    loaded = checkpoint.load(folder / "zero")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name or "deepening" in name or "router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    text = load_tokens(str(folder / "text.jsonl"), loaded.tokenizer)
    calibrate(loaded.model, text, seq_len=32, max_windows=4, deepest=2)
    checkpoint.save(folder / "trained", loaded.model, loaded.tokenizer)
    return folder / "trained"


@pytest.mark.slow  # eight runs
@pytest.mark.parametrize(("train", "flops"), [("added", 2e8), ("all", 1e9)])
def test_deepen_trains_rows_of_equal_flops_and_compares_them(
    folder, run_benchmark, tmp_path, train, flops
):
    arguments = ["--out", tmp_path / "out", "--seeds", 1, 2, "--block", 2, 5, "--rank", 2]
    arguments += ["--train", train]
    arguments += ["--task", "words:arithmetic?hops=2&held_out=1&modulus=3&each=1"]
    arguments += ["--num-recursions", 3, "--further", 1, "--flops", flops, "--windows", 6]
    arguments += ["--eval-windows", 4, "--seq-len", 90]
    found = run_benchmark("deepen.py", folder / "smol", *arguments)
    held_out = [row for row in found["table"] if row["asked"] == "held out"]
    table = {(row["row"], row["seed"], row["by"]): row for row in held_out}
    trained = [row for row in found["table"] if row["asked"] == "trained"]
    assert len(trained) == 8 and {*trained[0]["right_by_hops"]} == {"1", "2"}
    own = {row: table[row, 1, "own"] for row in ("gain", "every token", "no loop")}
    assert own["every token"]["mean_depth"] == 3 and own["no loop"]["mean_depth"] == 1
    assert own["no loop"]["steps"] > own["every token"]["steps"] > own["gain"]["steps"]
    longer = table["no loop, longer", 1, "own"]
    assert longer["steps"] == pytest.approx(2 * own["no loop"]["steps"], abs=1)
    for row in own.values():
        assert row["flops_at_most"] == pytest.approx(flops, rel=0.3)
        assert list(row["right_by_hops"]) == ["3"], "the steps that training did not ask for"
    gain = {by: row for (name, seed, by), row in table.items() if (name, seed) == ("gain", 1)}
    for policy in ("random", "confidence", "oracle"):
        spent = gain[policy]["mean_depth_where_asked"]
        assert spent == pytest.approx(gain["own"]["mean_depth_where_asked"], abs=0.05)
    assert {f"at most {d}" for d in (1, 2, 4)} | {f"all to {d}" for d in (1, 2, 3)} <= gain.keys()
    first = found["comparisons"][0]
    assert first["first"] == ["gain", "own"] and len(first["each"]) == 2
    assert all(0 <= each["p"] <= 1 for each in first["each"])
    again = run_benchmark("deepen.py", folder / "smol", *arguments)
    assert again == found, "what is finished is kept"
    parameters = {
        name: checkpoint.load(tmp_path / "out" / "starts" / name).model
        for name in ("every-token", "no-loop")
    }
    counts = {n: sum(p.numel() for p in m.parameters()) for n, m in parameters.items()}
    assert counts["no-loop"] >= counts["every-token"], "the control has no fewer parameters"


def test_deepen_text_pairs_tokens_with_those_of_the_source(folder, deepened, run_benchmark):
    arguments = [folder / "text.jsonl", "--tokens", 256, "--seq-len", 32]
    none = run_benchmark("deepen_text.py", folder / "zero", *arguments)
    assert {row["nats"] for row in none["rows"].values()} == {0.0}, "nothing is trained yet"
    assert none["minus_control"] == {}
    found = run_benchmark(
        "deepen_text.py", deepened, *arguments, "--depths", "own", "1", "1.5", "full"
    )
    rows = found["rows"]
    assert rows["1"]["nats"] == 0 and rows["1"]["mean_depth"] == 1
    assert rows["full"]["mean_depth"] == 2 and rows["full"]["nats"] != 0
    assert found["tokens"] == 256 and 0 <= found["auroc_of_gain"] <= 1
    assert rows["oracle"]["nats"] <= rows["random"]["nats"]

    as_control = run_benchmark(
        "deepen_text.py", folder / "zero", *arguments, "--control", deepened, "--depths", "own"
    )
    control, minus = as_control["rows"]["control"], as_control["minus_control"]["own"]
    assert control["nats"] == pytest.approx(rows["own"]["nats"]) and control["nats"] != 0
    assert minus["nats"] == pytest.approx(-control["nats"])


def test_self_speculation_counts_what_stops_as_accepted(folder, deepened, run_benchmark):
    arguments = ["--kind-field", "kind", "--windows", 4, "--seq-len", 40, "--draft-vocab", 20]
    arguments += ["--context", 16, "--rows", 1, 2, 4, "--rounds", 1]
    found = run_benchmark("self_speculation.py", deepened, folder / "text.jsonl", *arguments)
    rows = {(row["by"], row["group"]): row for row in found["acceptance"]}
    stops, deeper = rows["depth", "stops after 1"], rows["depth", "goes deeper"]
    assert stops["greedy"] == 1 and stops["sampled"] == pytest.approx(1, abs=1e-4)
    assert deeper["sampled"] < 1 and {("kind", "odd"), ("kind", "even")} <= rows.keys()
    assert stops["tokens"] + deeper["tokens"] == rows["all", "all"]["tokens"] == 160
    assert found["share_deeper"] == deeper["tokens"] / 160
    assert set(found["part_seconds"]) == {"prelude", "block", "coda", "head"}
    assert "worth building" in found["recommendation"]


def test_gains_follow_the_arithmetic(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = runpy.run_path(str(BENCHMARKS / "self_speculation.py"), run_name="script")
    seconds = {"prelude": [1.0, 1.0], "block": [4.0, 4.0], "coda": [1.0, 1.0], "head": [4.0, 4.0]}
    found = script["gains"](seconds, (1, 3), 3, 0.5, 0.9)[3]
    # Full: 18. Two drafts of 10, a first pass of 5, two deeper ones of 4, coda and head.
    given = 1 + 0.9 + 0.81
    assert found["over_full"] == pytest.approx(18 * given / (20 + 5 + 8 + 5))
    assert found["over_adaptive"] == pytest.approx(14 * given / (20 + 5 + (1 - 0.5**3) * 8 + 5))
    assert "not worth building" in script["recommendation"]({"greedy": {3: {"over_adaptive": 1.1}}})
    assert "worth building: 1.30" in script["recommendation"]({"a": {3: {"over_adaptive": 1.3}}})
