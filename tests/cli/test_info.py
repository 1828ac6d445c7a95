"""mor info: what a run or a checkpoint is."""

import json
import shutil

from mor.cli import main
from mor.cli.describe import facts
from mor.costs.flops import unique_params
from tests.cli.printed import found_json


def test_info_of_a_run_is_what_the_run_wrote(some_runs, capsys):
    found = found_json(capsys, "info", some_runs / "one")
    model = facts(some_runs / "one").model
    assert found["model"]["params"] == unique_params(model)
    assert (found["model"]["layout"], found["model"]["family"]) == ("1+3x2+1", "mor")
    training = found["training"]
    assert (training["step"], training["total_steps"], training["finished"]) == (8, 8, True)
    assert training["tokens"] == 8 * 2 * 32 and training["train_flops"] > 0
    rows = [json.loads(s) for s in (some_runs / "one" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["validation_nll"] for row in rows if "validation_nll" in row}
    assert found["last_validation"]["nll"] == losses[8]
    assert found["best_validation"]["nll"] == min(losses.values())
    assert found["changed_settings"]["steps"] == 8
    assert found["data"]["tokenizer"] == "bytes"
    assert found["data"]["validation"] == "5.0% of the text"
    assert "optim.lr" not in found["changed_settings"]
    for name, size in found["checkpoints"].items():
        files = (some_runs / "one" / "checkpoints" / name).rglob("*")
        assert size == sum(file.stat().st_size for file in files if file.is_file())
    main(["info", str(some_runs / "one")])
    shown = capsys.readouterr().out
    assert "1+3x2+1" in shown and f"{losses[8]:.4f}" in shown and "step-00000008" in shown


def test_info_of_a_checkpoint_tells_how_far_that_one_is(some_runs, tmp_path, capsys):
    first = some_runs / "one" / "checkpoints" / "step-00000004"
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
