"""What is there: mor info, mor runs, mor compare, mor presets."""

import json
import shutil

import pytest

from mor.cli import main
from mor.cli.describe import facts
from mor.costs.flops import unique_params
from mor.model.config import PRESET_NAMES, preset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
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


def found_json(capsys, *arguments):
    capsys.readouterr()
    main([str(word) for word in arguments] + ["--json"])
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_info_of_a_run_is_what_the_run_wrote(folder, capsys):
    found = found_json(capsys, "info", folder / "one")
    model = facts(folder / "one").model
    assert found["model"]["params"] == unique_params(model)
    assert (found["model"]["layout"], found["model"]["family"]) == ("1+3x2+1", "mor")
    training = found["training"]
    assert (training["step"], training["total_steps"], training["finished"]) == (8, 8, True)
    assert training["tokens"] == 8 * 2 * 32 and training["train_flops"] > 0
    rows = [json.loads(s) for s in (folder / "one" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["validation_nll"] for row in rows if "validation_nll" in row}
    assert found["last_validation"]["nll"] == losses[8]
    assert found["best_validation"]["nll"] == min(losses.values())
    assert found["changed_settings"]["steps"] == 8
    assert found["data"]["tokenizer"] == "bytes"
    assert found["data"]["validation"] == "5.0% of the documents"
    assert "optim.lr" not in found["changed_settings"]
    for name, size in found["checkpoints"].items():
        files = (folder / "one" / "checkpoints" / name).rglob("*")
        assert size == sum(file.stat().st_size for file in files if file.is_file())
    main(["info", str(folder / "one")])
    shown = capsys.readouterr().out
    assert "1+3x2+1" in shown and f"{losses[8]:.4f}" in shown and "step-00000008" in shown


def test_info_of_a_checkpoint_tells_how_far_that_one_is(folder, tmp_path, capsys):
    first = folder / "one" / "checkpoints" / "step-00000004"
    found = found_json(capsys, "info", first)
    assert found["training"]["step"] == 4 and not found["training"]["finished"]
    assert found["last_validation"]["step"] == 4
    assert list(found["checkpoints"]) == [first.name]
    shutil.copytree(first, tmp_path / "alone")
    alone = found_json(capsys, "info", tmp_path / "alone")
    assert alone["model"] == found["model"] | {
        "kv_bytes_per_token": alone["model"]["kv_bytes_per_token"]
    }
    assert alone["training"]["total_steps"] == 8 and "data" not in alone
    assert "last_validation" not in alone


def test_runs_lists_every_run_below_a_folder(folder, capsys):
    rows = {row["run"]: row for row in found_json(capsys, "runs", folder)}
    assert sorted(rows) == ["begun", "deep/other", "one", "two"]
    assert rows["one"]["finished"] and rows["one"]["best_nll"] <= rows["one"]["last_nll"]
    assert rows["deep/other"]["family"] == "recursive" and rows["deep/other"]["tokens"] == 256
    assert (rows["begun"]["step"], rows["begun"]["total_steps"]) == (0, 8)
    assert not rows["begun"]["finished"] and rows["begun"]["last_nll"] is None
    main(["runs", str(folder)])
    shown = capsys.readouterr().out
    assert "deep/other" in shown and "0/8" in shown and "unfinished" in shown


def test_a_damaged_run_hides_no_other(folder, tmp_path, capsys):
    shutil.copytree(folder / "one", tmp_path / "runs" / "one")
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "train.json").write_text('{"steps": 3')
    bad, one = found_json(capsys, "runs", tmp_path / "runs")
    assert "train.json is damaged" in bad["problem"] and one["problem"] is None
    main(["runs", str(tmp_path / "runs")])
    assert "unreadable" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    main(["runs", str(tmp_path / "empty")])
    assert "holds no runs" in capsys.readouterr().out


def test_comparing_shows_what_differs_and_nothing_else(folder, capsys):
    found = found_json(capsys, "compare", folder / "one", folder / "two")
    assert found["differing"] == {"seed": [0, 1]} and found["cautions"] == []
    one, two = found["numbers"]
    assert one["train_flops"] == two["train_flops"] and one["params"] == two["params"]
    assert one["validation_nll"] != two["validation_nll"]
    main(["compare", str(folder / "one"), str(folder / "two")])
    shown = capsys.readouterr().out
    assert "caution" not in shown and f"{one['validation_nll']:.4f}" in shown


def test_comparing_says_why_scores_are_not_comparable(folder, tmp_path, capsys):
    notes = found_json(capsys, "compare", folder / "one", folder / "deep" / "other")["cautions"]
    assert any("tokenizers differ" in note for note in notes)
    assert any("training FLOPs differ" in note for note in notes)
    assert not any("validation data differ" in note for note in notes)
    notes = found_json(capsys, "compare", folder / "one", folder / "begun")["cautions"]
    assert any("begun is not finished" in note for note in notes)
    assert any("begun was never validated" in note for note in notes)
    shutil.copytree(folder / "one", tmp_path / "longer")
    saved = json.loads((tmp_path / "longer" / "train.json").read_text())
    (tmp_path / "longer" / "train.json").write_text(json.dumps(saved | {"eval_windows": 9}))
    notes = found_json(capsys, "compare", folder / "one", tmp_path / "longer")["cautions"]
    assert len(notes) == 1 and "validation data differ" in notes[0]
    alone = tmp_path / "alone"
    shutil.copytree(folder / "one" / "checkpoints" / "step-00000008", alone)
    notes = found_json(capsys, "compare", folder / "one", alone)["cautions"]
    assert len(notes) == 1 and "alone belongs to no run" in notes[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "nowhere"], "neither a checkpoint"),
        (["runs", "nowhere"], "not a folder"),
        (["compare", "nowhere", "nowhere"], "neither a checkpoint"),
        (["compare", "nowhere"], "paths must be a list of at least 2"),
    ],
)
def test_mistakes_are_explained(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and words in printed and printed.count("\n") == 1


def test_presets_are_listed_with_their_sizes(capsys):
    rows = found_json(capsys, "presets")
    assert [row["preset"] for row in rows] == list(PRESET_NAMES)
    sizes = {size["num_recursions"]: size for size in rows[1]["sizes"]}
    assert sizes[3]["layout"] == "1+10x3+1"
    assert sizes[1]["params"] == unique_params(preset("smollm-360m")) == 361_821_120
    main(["presets"])
    shown = capsys.readouterr().out
    assert "smollm-1.7b" in shown and "…" not in shown
