"""lm-eval without its advice and progress bars; what matters gets through."""

import logging
import sys

import pytest
from lm_eval import evaluator

from mor.evaluation.quiet import quiet, without_bars


def test_cut_requests_are_counted_and_only_errors_pass(caplog):
    model = logging.getLogger("lm_eval.models.huggingface")
    before = model.level, logging.getLogger("lm_eval").level
    with quiet() as cut:
        model.warning("Combined length of context (9) and continuation (3) exceeds 8")
        model.warning("advice")
        model.error("trouble")
    assert cut.count == 1
    assert [record.getMessage() for record in caplog.records] == ["trouble"]
    assert (model.level, logging.getLogger("lm_eval").level) == before and not model.filters


def test_git_is_not_asked_outside_a_repository(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    asked = evaluator.get_git_commit_hash
    with quiet():
        assert evaluator.get_git_commit_hash() is None
    assert capfd.readouterr().err == "" and evaluator.get_git_commit_hash is asked


def test_lines_pass_and_bars_do_not_also_where_it_fails(capsys):
    with pytest.raises(ValueError, match="stop"), without_bars():
        print("a line\n\r 10%|#  |\r100%|###|", file=sys.stderr)
        raise ValueError("stop")
    assert capsys.readouterr().err == "a line\n"
