"""mor eval: scores in JSON, by depth, with top-k labelled."""

import json
import math
import re
import shutil

import pytest

from mor.cli import main
from tests.cli.printed import last_json


def test_eval_prints_json_by_depth_and_labels_topk(run, capsys):
    main(["eval", str(run / "run"), "--json"])
    assert last_json(capsys)["causal"] is True
    main(["eval", str(run / "run"), "--selection", "topk", "--json"])
    topk, causal = last_json(capsys)
    assert topk["causal"] is False and causal["causal"] is True
    assert (
        topk["leak_nats"] == pytest.approx(causal["nll"] - topk["nll"])
        and causal["leak_nats"] is None
    )
    assert causal["perplexity"] == pytest.approx(math.exp(causal["nll"]))
    main(["eval", str(run / "run"), "--routing", "topk"])
    shown = capsys.readouterr().out
    assert "topk, non-causal" in shown and f"{causal['nll']:.4f}" in shown and "…" not in shown
    assert "all of the validation data of the run" in shown
    text = ["eval", str(run / "run"), "--data", str(run / "a.jsonl")]
    main([*text, "--max-windows", "3"])
    assert re.search(r" 3 of \d+ windows of /", " ".join(capsys.readouterr().out.split()))
    main([*text, "--by-depth", "--json"])
    assert [row["max_depth"] for row in last_json(capsys)] == [1, 2]


def test_a_cap_on_the_depth_is_the_row_of_that_depth(run, capsys):
    one = ["eval", str(run / "run"), "--max-windows", "2", "--json"]
    main([*one, "--by-depth"])
    rows = last_json(capsys)
    main([*one, "--max-depth", "1", "--device", "cpu"])
    assert last_json(capsys) == rows[0]
    for words, said in (("--max-depth 3", "at most 2 recursions"), ("--device tpu", "it has cpu")):
        with pytest.raises(SystemExit):
            main([*one, *words.split()])
        assert said in capsys.readouterr().err


def test_the_text_of_a_run_is_that_or_none(run, tmp_path, capsys):
    """Also for mor report; explain reads none but what it is given."""
    moved = tmp_path / "run"
    shutil.copytree(run / "run", moved, ignore=shutil.ignore_patterns("report.html"))
    text = tmp_path / "a.jsonl"
    text.write_text("".join((run / "a.jsonl").read_text().splitlines(keepends=True)[:50]))
    settings = json.loads((moved / "train.json").read_text())
    settings["data"]["path"] = str(text)
    (moved / "train.json").write_text(json.dumps(settings))
    for command in ("eval", "report"):
        with pytest.raises(SystemExit) as stopped:
            main([command, str(moved)])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1
        assert re.search(r"no longer those of .*validation.documents was \d+, is \d+.*--data", said)
    main(["eval", str(moved), "--data", str(text), "--max-windows", "1", "--json"])
    assert last_json(capsys)["text"].endswith(f"of {text}")


def test_a_field_has_no_effect_on_prepared_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prepared").mkdir()
    for name in ("manifest.json", "tokenizer.json"):
        (tmp_path / "prepared" / name).write_text("{}")
    with pytest.raises(SystemExit):
        main(["eval", "run", "--data", "prepared", "--text-field", "text"])
    assert capsys.readouterr().err == "error: --text-field has no effect with prepared data\n"
