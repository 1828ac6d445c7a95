"""Presets and routers are chosen by short flags."""

import json

from mor.cli import main


def test_train_takes_a_preset_and_a_router(tmp_path, run):
    main(
        [
            "train",
            "--preset",
            "tiny",
            "--num-recursions",
            "3",
            "--router",
            "token_choice",
            "--out",
            str(tmp_path / "r"),
            "--data.path",
            str(run / "a.jsonl"),
            "--data.tokenizer",
            "bytes",
            "--steps",
            "1",
            "--batch-size",
            "2",
            "--seq-len",
            "16",
        ]
    )
    kept = json.loads((tmp_path / "r" / "train.json").read_text())["model"]
    assert (kept["num_recursions"], kept["router"]["kind"], kept["dim"]) == (3, "token_choice", 64)
    assert kept["vocab_size"] == 257
