"""The paper's benchmarks through lm-eval: the stock prompts from any source, the same scores for
any batch."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, dynamic_module_utils

from mor import checkpoint
from mor.cli import main
from mor.conversion.remote_code import export
from mor.data.stream import Part, TokenData
from mor.data.tokenizer import byte_tokenizer
from mor.evaluation import harness
from mor.evaluation.harness import (
    STOCK_TASKS,
    TaskResult,
    check_tasks,
    evaluate_tasks,
    evenly_over,
    load_model,
    paper_average,
)
from mor.evaluation.nll import evaluate
from mor.hub.modeling import MoRForCausalLM
from mor.model.budget import router_for
from tests.cli.printed import last_json
from tests.conftest import tiny

# Documents as the hub has them, by lm-eval's task.
HUB = {
    "lambada_openai": [{"text": f"{'I see a ball. ' * i}He threw the ball"} for i in range(6)],
    "hellaswag": [
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
    "piqa": [
        {
            "goal": f"How to open {'a very ' * i}small jar?",
            "sol1": "Twist.",
            "sol2": "Shout at it.",
            "label": 0,
        }
        for i in range(5)
    ],
    "winogrande": [
        {
            "sentence": "Sarah was better than Maria so _ got the harder cases.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "1",
        },
    ],
    "arc_easy": [
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
    "arc_challenge": [
        {
            "id": "c",
            "question": "Why is it dark?",
            "answerKey": "A",
            "choices": {"text": ["night", "day"], "label": ["A", "B"]},
        },
    ],
}


MMLU = {
    f"mmlu_{subject}": {
        split: [
            {
                "subject": subject,
                "question": f"{words} {i}?",
                "choices": ["0", "1", "2", "3"],
                "answer": i,
            }
            for i in range(count)
        ]
        for split, words, count in (("test", "What is", size), ("dev", "Example", 2))
    }
    for subject, size in (("anatomy", 3), ("abstract_algebra", 2))
}


WITHOUT_LAMBADA = ("hellaswag", "piqa", "winogrande", "arc", "mmlu")


def write_task(folder, name, splits, **settings):
    """A task file as the command line describes it: lm-eval's own, with data from files."""
    (stock,) = (
        file
        for part in ("lambada", "hellaswag", "piqa", "winogrande", "arc", "mmlu/default")
        for file in (STOCK_TASKS / part).glob("*.yaml")
        if f"task: {name}\n" in file.read_text().replace('"', "") + "\n"
    )
    files = {}
    for split, rows in splits.items():
        files[split] = str(folder / f"{name}-{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        f"include: {stock}",
        f"task: {name}",
        "dataset_path: json",
        "dataset_name: null",
        f"dataset_kwargs: {{data_files: {json.dumps(files)}}}",
        *(f"{key}: {value}" for key, value in settings.items()),
    ]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The benchmarks' documents in the schema of the hub, in files."""
    folder = tmp_path_factory.mktemp("hub")
    for name, rows in HUB.items():
        write_task(folder, name, dict.fromkeys(("train", "validation", "test"), rows))
    for name, splits in MMLU.items():
        write_task(folder, name, splits)
    (folder / "mmlu.yaml").write_text(json.dumps({"group": "mmlu", "task": list(MMLU)}))
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


@pytest.fixture(scope="module")
def scored(hub):
    """All six benchmarks."""
    return evaluate_tasks(*wrapped(), include_path=hub)


def test_the_requests_read_as_the_benchmarks_define_them(scored):
    asked = {key[2:] for key in requests(scored)}
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


@pytest.mark.parametrize(
    "router", ["expert_choice", "token_choice", pytest.param("fixed", marks=pytest.mark.slow)]
)
def test_scores_do_not_depend_on_batch_size_or_padding(router, hub):
    results = [
        evaluate_tasks(*wrapped(router), batch_size=size, include_path=hub) for size in (1, 8)
    ]
    one, eight = map(requests, results)
    assert len(one) > 50 and len({round(x, 3) for x in one.values()}) > 30
    assert eight.keys() == one.keys()
    assert all(eight[key] == pytest.approx(one[key], abs=1e-4) for key in one)
    assert results[0].tasks == results[1].tasks


def test_a_model_that_gives_no_numbers_has_no_score(hub):
    model, tokenizer = wrapped()
    with torch.no_grad():
        model.model.embedding.weight[ord("T"), 0] = math.nan
    words = r"not finite \(reading '.*'\): its weight .*embedding.weight holds some"
    with pytest.raises(ValueError, match=words):
        evaluate_tasks(model, tokenizer, ["piqa"], include_path=hub)


def test_on_cuda_answers_are_read_in_bfloat16_and_added_up_in_float32(hub, monkeypatch):
    exact = requests(evaluate_tasks(*wrapped(), ["piqa"], include_path=hub))
    monkeypatch.setattr(harness, "is_low", lambda *_: True)
    low = requests(evaluate_tasks(*wrapped(), ["piqa"], include_path=hub))
    assert low.keys() == exact.keys() and low != exact
    assert all(low[key] == pytest.approx(exact[key], rel=0.02) for key in exact)
    in_bfloat16 = [torch.tensor(value).bfloat16().item() == value for value in low.values()]
    assert not all(in_bfloat16)


def test_lm_eval_finds_the_same_likelihood_of_a_text_in_the_same_windows():
    model, tokenizer = wrapped()
    text = ("A naïve 日本 cat. 🙂" * 48).encode()[:1020].decode(errors="ignore")
    text += "." * (1024 - len(text.encode()))  # two windows of the model
    (nats,) = HFLM(pretrained=model, tokenizer=tokenizer).loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True
    )
    # lm-eval begins with end of text.
    stream = Part(np.array([256, *byte_tokenizer().encode(text)]), np.array([1, 1025]))
    found = evaluate(model.model, TokenData([stream], 2, 1024, byte_tokenizer().text_bytes))
    assert found.score.nats == pytest.approx(-nats, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(-nats / math.log(2) / 1024, rel=1e-5)


def test_with_selection_that_sees_the_future_they_would(hub, monkeypatch):
    real = MoRForCausalLM.forward
    monkeypatch.setattr(
        MoRForCausalLM, "forward", lambda self, *a, **k: real(self, *a, selection="topk", **k)
    )
    one, eight = (
        requests(evaluate_tasks(*wrapped(), ["lambada"], batch_size=n, include_path=hub))
        for n in (1, 8)
    )
    assert max(abs(one[key] - eight[key]) for key in one) > 1e-3


def test_scores_are_what_the_log_likelihoods_say(scored):
    found = {}
    for key, value in requests(scored).items():
        found.setdefault(key[:2], []).append((value, len(key[3]) - 1))
    scores = {row.task: row for row in (*scored.tasks, *scored.parts)}

    def accuracy(name, gold):
        best = [max(range(len(c)), key=lambda i, c=c: c[i][0] / c[i][1]) for c in found_of(name)]
        return sum(b == g for b, g in zip(best, gold, strict=True)) / len(gold)

    def found_of(name):
        return [found[key] for key in sorted(k for k in found if k[0] == name)]

    piqa = [row["label"] for row in HUB["piqa"]]
    hellaswag = [int(row["label"]) for row in HUB["hellaswag"]]
    arc_easy = [0, 1]  # the answers "1" of 1, 2, 3 and "B" of A, B, C, D
    for task, gold in [("piqa", piqa), ("hellaswag", hellaswag), ("arc_easy", arc_easy)]:
        assert scores[task].score == pytest.approx(accuracy(task, gold)), task
    assert scores["arc"].score == pytest.approx(
        (scores["arc_easy"].score + scores["arc_challenge"].score) / 2
    )
    assert scored.average == pytest.approx(sum(row.score for row in scored.tasks) / 6)
    assert [row.metric for row in scored.tasks] == [
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


def test_a_limit_is_spread_over_all_documents(hub):
    assert evenly_over({"a": 3, "b": 5}, 4) == {"a": [0, 2], "b": [1, 3]}
    assert evenly_over({"a": 3, "b": 5}, 99) == {"a": [0, 1, 2], "b": [0, 1, 2, 3, 4]}
    assert evenly_over({"a": 1, "b": 6}, 2) == {"a": [0], "b": [2]}
    result = evaluate_tasks(*wrapped(), ["piqa", "arc", "mmlu"], limit=3, include_path=hub)
    assert {row.task: row.items for row in result.tasks} == {"piqa": 3, "arc": 3, "mmlu": 3}
    with pytest.raises(ValueError, match="limit of at least 2"):
        evaluate_tasks(*wrapped(), ["arc"], limit=1, include_path=hub)


def test_mistakes_are_explained(hub, tmp_path):
    with pytest.raises(ValueError, match=r"no task 'helaswag' \(did you mean 'hellaswag'\?\)"):
        check_tasks(["helaswag"])
    with pytest.raises(ValueError, match="each task once"):
        check_tasks(["piqa", "piqa"])
    with pytest.raises(ValueError, match=r"not a folder with task files"):
        evaluate_tasks(*wrapped(), ["piqa"], include_path=tmp_path)
    write_task(tmp_path, "piqa", dict.fromkeys(("train", "validation"), HUB["piqa"]), num_fewshot=0)
    with pytest.raises(ValueError, match=r"num_fewshot: 0, .* with 2 examples; use --shots 0"):
        evaluate_tasks(*wrapped(), ["piqa"], shots=2, include_path=tmp_path)
    (tmp_path / "arc_easy.yaml").write_text("task: [arc_easy\n")
    with pytest.warns(UserWarning, match=r"no task in .*arc_easy.yaml"):
        evaluate_tasks(*wrapped(), ["piqa"], include_path=tmp_path)
    (tmp_path / "arc_easy.yaml").unlink()
    (tmp_path / "piqa-validation.jsonl").unlink()
    with pytest.raises(ValueError, match=r"data of piqa could not be read .*--include-path DIR"):
        evaluate_tasks(*wrapped(), ["piqa"], include_path=tmp_path)


@pytest.mark.parametrize("depth", ["1", "4.5"])
def test_the_command_scores_a_benchmark_at_a_depth(depth, hub, tmp_path, capsys):
    """Every answer has the log-likelihood that the model gives it with that budget."""
    model = wrapped("random")[0].model
    checkpoint.save(tmp_path / "c", model, byte_tokenizer())
    command = ["eval", str(tmp_path / "c"), "--tasks", "arc", "--include-path", str(hub), "--json"]
    main([*command, "--depth", depth, "--out", str(tmp_path / "all.json")])
    row = last_json(capsys)
    assert row["tasks"][0]["task"] == "arc" and row["depth"] == float(depth)
    assert json.loads((tmp_path / "all.json").read_text())["depth"] == float(depth)
    full = SimpleNamespace(full=json.loads((tmp_path / "all.json").read_text()))
    found, tokenizer = requests(full), byte_tokenizer()
    assert len(found) == 9
    for (*_, context, answer), value in found.items():
        ids, new = tokenizer.encode(context), tokenizer.encode(answer)
        with torch.no_grad():
            router = router_for(model, float(depth))
            logp = model(torch.tensor([ids + new]), router=router).logits_BTV[0].log_softmax(-1)
        expected = logp[range(len(ids) - 1, len(ids) + len(new) - 1), new].sum()
        assert value == pytest.approx(float(expected), abs=1e-3)


def test_a_depth_is_that_of_one_call(hub):
    model, tokenizer = wrapped("random")

    def score(**settings):
        found = evaluate_tasks(model, tokenizer, ["piqa"], include_path=hub, **settings)
        return list(requests(found).values())

    own = score()
    assert score(depth=1) != own and score() == own
    with pytest.raises(ValueError, match="from 1 on"):
        score(depth=0)
    assert score() == own


def test_the_command_prints_a_table_or_json_for_mor_and_for_others(hub, tmp_path, capsys):
    model, _ = wrapped()
    checkpoint.save(tmp_path / "c", model.model, byte_tokenizer())
    main(["eval", str(tmp_path / "c"), "--tasks", "piqa,arc", "--include-path", str(hub), "--json"])
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
            "--include-path",
            str(hub),
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
        (["--tasks", "piqa", "--depth", "1,2"], "--tasks takes one --depth"),
        (["--tasks", "piqa", "--depth", "1.5"], "run mor calibrate"),
        (["--tasks", "piqa", "--by-depth"], "by-depth"),
        (["--limit", "3"], "--limit"),
        (["--tasks", "nothing"], "no task 'nothing'"),
    ]:
        with pytest.raises(SystemExit):
            main(["eval", str(tmp_path / "c"), *arguments])
        assert words in capsys.readouterr().err


@pytest.fixture
def without_mors_classes(monkeypatch, tmp_path):
    """transformers as it is where nobody imported mor."""
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    monkeypatch.setattr(MODEL_FOR_CAUSAL_LM_MAPPING, "_extra_content", {})
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the modules' folder is added to it


@pytest.mark.slow
@pytest.mark.usefixtures("without_mors_classes")
def test_the_stock_command_of_lm_eval_scores_an_export(hub, tmp_path, monkeypatch):
    """`lm_eval --model hf` knows nothing of mor: the directory brings its code."""
    model, _ = wrapped()
    checkpoint.save(tmp_path / "c", model.model, byte_tokenizer())
    export(tmp_path / "c", tmp_path / "out")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "ball.yaml").write_text(
        f"task: ball\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: "
        f"{hub}/lambada_openai-test.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood\n"
        "doc_to_text: '{{text[:-5]}}'\ndoc_to_target: ' ball'\n"
        "target_delimiter: ''\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    "
        "higher_is_better: true\n"
    )
    used = []
    load = HFLM._create_model
    monkeypatch.setattr(
        HFLM, "_create_model", lambda self, *a, **k: (load(self, *a, **k), used.append(self._model))
    )
    settings = f"pretrained={tmp_path / 'out'},trust_remote_code=True,dtype=float32"
    command = ["lm_eval", "run", "--model", "hf", "--model_args", settings, "--tasks", "ball"]
    command += ["--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--log_samples"]
    command += ["--batch_size", "2", "--output_path", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", command)
    cli_evaluate()
    assert [type(model).__module__.split(".")[0] for model in used] == ["transformers_modules"]
    rows = [json.loads(line) for line in next((tmp_path / "results").rglob("samples_ball*")).open()]
    stock = {row["doc"]["text"][:-5]: float(row["resps"][0][0][0]) for row in rows}
    result = evaluate_tasks(*wrapped(), ["lambada"], include_path=hub)
    ours = {key[2]: value for key, value in requests(result).items()}
    assert stock.keys() == ours.keys() and all(
        stock[c] == pytest.approx(ours[c], abs=1e-4) for c in ours
    )
