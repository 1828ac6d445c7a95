"""mor compare: what differs between runs, and whether their scores are comparable."""

import json
import shutil

from mor.cli import main
from tests.cli.printed import found_json


def test_comparing_shows_what_differs_and_nothing_else(some_runs, capsys):
    found = found_json(capsys, "compare", some_runs / "one", some_runs / "two")
    assert found["differing"] == {"seed": [0, 1]} and found["cautions"] == []
    one, two = found["numbers"]
    assert one["train_flops"] == two["train_flops"] and one["params"] == two["params"]
    assert one["validation_nll"] != two["validation_nll"]
    main(["compare", str(some_runs / "one"), str(some_runs / "two")])
    shown = capsys.readouterr().out
    assert "caution" not in shown and f"{one['validation_nll']:.4f}" in shown


def test_comparing_says_why_scores_are_not_comparable(some_runs, tmp_path, capsys):
    notes = found_json(capsys, "compare", some_runs / "one", some_runs / "deep" / "other")[
        "cautions"
    ]
    assert any("tokenizers differ" in note for note in notes)
    assert any("training FLOPs differ" in note for note in notes)
    assert not any("validation data differ" in note for note in notes)
    notes = found_json(capsys, "compare", some_runs / "one", some_runs / "begun")["cautions"]
    assert any("begun is not finished" in note for note in notes)
    assert any("begun was never validated" in note for note in notes)
    shutil.copytree(some_runs / "one", tmp_path / "longer")
    saved = json.loads((tmp_path / "longer" / "train.json").read_text())
    (tmp_path / "longer" / "train.json").write_text(json.dumps(saved | {"eval_windows": 9}))
    notes = found_json(capsys, "compare", some_runs / "one", tmp_path / "longer")["cautions"]
    assert len(notes) == 1 and "validation data differ" in notes[0]
    shutil.copytree(some_runs / "two", tmp_path / "old")
    log = (tmp_path / "old" / "metrics.jsonl").read_text()
    (tmp_path / "old" / "metrics.jsonl").write_text(log.replace("validation_bytes", "other"))
    notes = found_json(capsys, "compare", some_runs / "one", tmp_path / "old")["cautions"]
    assert len(notes) == 1 and "old are of an earlier version" in notes[0]
    alone = tmp_path / "alone"
    shutil.copytree(some_runs / "one" / "checkpoints" / "step-00000008", alone)
    notes = found_json(capsys, "compare", some_runs / "one", alone)["cautions"]
    assert len(notes) == 1 and "alone belongs to no run" in notes[0]


def test_validation_text_is_known_by_what_it_was_and_not_by_its_place(some_runs, tmp_path, capsys):
    """The same text elsewhere is the same; another text in the same place is another."""
    shutil.copytree(some_runs / "two", tmp_path / "two")
    settings = tmp_path / "two" / "train.json"
    values = json.loads(settings.read_text())
    values["data"]["path"] = "elsewhere.jsonl"
    settings.write_text(json.dumps(values))
    assert found_json(capsys, "compare", some_runs / "one", tmp_path / "two")["cautions"] == []
    for folder in (tmp_path / "two" / "checkpoints").iterdir():
        (folder / "checksums.json").unlink()
        progress = folder / "training_state" / "progress.json"
        recorded = json.loads(progress.read_text())
        recorded["data"]["validation.sha256"] = "another"
        progress.write_text(json.dumps(recorded))
    (caution,) = found_json(capsys, "compare", some_runs / "one", tmp_path / "two")["cautions"]
    assert caution.startswith("the validation data differ")
