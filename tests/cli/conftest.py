"""Runs for the commands to work on."""

import json
import shutil

import pytest

from mor.cli import main


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "a.jsonl").write_text(
        "".join(
            json.dumps({"text": f"The square of {i} is {i * i}. " * 6}) + "\n" for i in range(120)
        )
    )
    config = folder / "run.toml"
    config.write_text(
        f'steps = 6\nbatch_size = 4\nseq_len = 32\n[data]\npath = "{folder}/a.jsonl"\nvocab_size = '
        "300\n"
        "[model]\nnum_recursions = 2\nprelude_layers = 1\nshared_layers = 1\ncoda_layers = 1\ndim "
        "= 32\n"
        "num_heads = 2\nnum_kv_heads = 1\nhead_dim = 16\nffn_dim = 64\n[model.router]\nkind = "
        '"expert_choice"\n'
    )
    main(
        [
            "train",
            "--config",
            str(config),
            "--out",
            str(folder / "run"),
            "--steps",
            "8",
            "--model.router.alpha",
            "0.2",
        ]
    )
    return folder


@pytest.fixture(scope="session")
def some_runs(tmp_path_factory):
    """Runs on the same text: two that differ in the router's seed of weights, one that is shorter
    and has another tokenizer, and one that has only begun."""
    made = tmp_path_factory.mktemp("runs")
    (made / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"Line {i}: {i * i} apples. " * 6}) + "\n" for i in range(60))
    )
    common = ["train", "--preset", "tiny", "--num-recursions", "2", "--batch-size", "2"]
    common += ["--seq-len", "32", "--eval-every", "4", "--data.path", str(made / "a.jsonl")]
    bytes_ = ["--data.tokenizer", "bytes", "--steps", "8", "--save-every", "4"]
    main([*common, *bytes_, "--out", str(made / "runs" / "one")])
    main([*common, *bytes_, "--out", str(made / "runs" / "two"), "--seed", "1"])
    other = ["--data.vocab-size", "300", "--steps", "4", "--router", "fixed"]
    main([*common, *other, "--out", str(made / "runs" / "deep" / "other")])
    begun = made / "runs" / "begun"
    begun.mkdir()
    shutil.copy(made / "runs" / "one" / "train.json", begun)
    return made / "runs"
