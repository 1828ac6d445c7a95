"""mor eval: scores in JSON, by depth, with top-k labelled."""

import math
import re

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
