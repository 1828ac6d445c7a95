"""Flat copies of the benchmarks ask what the hub's data asks."""

import json
import sys
import zlib
from pathlib import Path

import pytest

from mor.evaluation.harness import TASK_NAMES, evaluate_tasks
from tests.evaluation.test_harness import WITHOUT_LAMBADA, cache, hub, requests, wrapped  # noqa: F401 (fixtures)

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from flat_tasks import write_tasks

FLAT = {
    "lambada_openai_test": [
        {"context": f"{'I see a ball. ' * i}He threw the", "continuation": " ball"}
        for i in range(6)
    ],
    "hellaswag_val": [
        {
            "query": "Roof: A man is on a roof. He",
            "choices": ["runs.", "sits down there.", "is.", "eats a tile."],
            "gold": 3,
        },
        {
            "query": "Baking: Two people mix dough. They",
            "choices": ["fly off.", "rest.", "swim.", "bake."],
            "gold": 3,
        },
    ],
    "piqa_val": [
        {
            "query": f"Question: How to open {'a very ' * i}small jar?\nAnswer:",
            "choices": ["Twist.", "Shout at it."],
            "gold": 0,
        }
        for i in range(5)
    ],
    "winogrande_xl_val": [
        {
            "contexts": [
                "Sarah was better than Maria so Sarah",
                "Sarah was better than Maria so Maria",
            ],
            "continuation": "got the harder cases.",
            "gold": 0,
        },
    ],
    "arc_easy_test": [
        {
            "query": "Question: What is wet?\nAnswer:",
            "choices": ["water", "sand", "iron"],
            "gold": 0,
        },
        {
            "query": "Question: What burns?\nAnswer:",
            "choices": ["stone", "wood", "ice", "glass"],
            "gold": 1,
        },
    ],
    "arc_challenge_test": [
        {"query": "Question: Why is it dark?\nAnswer:", "choices": ["night", "day"], "gold": 0}
    ],
    "mmlu_test": [
        {"subject": s, "question": f"What is {i}?", "choices": ["0", "1", "2", "3"], "gold": i}
        for s, count in [("anatomy", 3), ("abstract_algebra", 2)]
        for i in range(count)
    ],
    "mmlu_dev": [
        {"subject": s, "question": f"Example {i}?", "choices": ["0", "1", "2", "3"], "gold": i}
        for s in ("anatomy", "abstract_algebra")
        for i in range(2)
    ],
}


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat")
    for name, rows in FLAT.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tasks(flat, tmp_path_factory):
    out = tmp_path_factory.mktemp("tasks")
    write_tasks(flat, out)
    return out


@pytest.mark.parametrize("shots", [0, 2])
def test_flat_files_ask_what_the_hubs_data_asks(shots, tasks, hub):  # noqa: F811
    names = ["mmlu"] if shots else TASK_NAMES
    results = [
        evaluate_tasks(*wrapped(), names, shots=shots, include_path=folder)
        for folder in (tasks, hub)
    ]
    first, second = map(requests, results)
    assert first == second and len(first) == (20 if shots else 55)
    assert results[0].tasks == results[1].tasks


def test_packed_files_are_read_as_well(flat, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.compress((flat / "piqa_val.jsonl").read_bytes())
    (tmp_path / "piqa_val.jsonl.zst").write_bytes(packed)
    assert write_tasks(tmp_path, tmp_path / "out") == ["piqa"]
    rows = [json.loads(line) for line in (tmp_path / "out/piqa-validation.jsonl").open()]
    assert rows == FLAT["piqa_val"]


def test_without_examples_there_are_no_shots(tasks):
    with pytest.raises(ValueError, match=r"piqa says num_fewshot: 0, .* use --shots 0"):
        evaluate_tasks(*wrapped(), ["piqa"], shots=2, include_path=tasks)


def test_mistakes_in_flat_files_are_explained(tmp_path):
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(ValueError, match=r"needs some of .*piqa_val.jsonl.* holds: other.txt"):
        write_tasks(tmp_path, tmp_path / "out")
    (tmp_path / "piqa_val.jsonl").write_text('{"goal": 1}\n')
    with pytest.raises(
        ValueError, match=r"piqa_val.jsonl:1: no field query, choices, gold; it has goal"
    ):
        write_tasks(tmp_path, tmp_path / "out")
    row = {"query": "a", "choices": ["b", "c"], "gold": 1}
    (tmp_path / "piqa_val.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"piqa_val.jsonl:1: query 'a' does not read 'Question: "):
        write_tasks(tmp_path, tmp_path / "out")
    row["gold"] = 2
    (tmp_path / "piqa_val.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"piqa_val.jsonl:1: gold 2 is not .* of its 2 choices"):
        write_tasks(tmp_path, tmp_path / "out")
    (tmp_path / "piqa_val.jsonl").unlink()
    (tmp_path / "piqa_val.jsonl.gz").write_bytes(zlib.compress(b"x"))
    with pytest.raises(ValueError, match=r"piqa_val.jsonl.gz is damaged"):
        write_tasks(tmp_path, tmp_path / "out")
