"""The process that tries structures says of each whether it can be followed."""

import io
import json
import signal

from mor.data.tokenizer import byte_tokenizer
from mor.server import structure_process


def test_each_structure_gets_one_line_and_no_alarm_is_left(monkeypatch, capsys):
    tokenizer = byte_tokenizer()
    lines = [
        {
            "tokenizer": tokenizer.backend.to_str(),
            "end_ids": list(tokenizer.end_ids),
            "limit_s": 60,
        },
        {"kind": "regex", "text": "a+"},
        {"kind": "regex", "text": "("},
        {"kind": "json_schema", "text": '{"type": "null"}'},
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(x) + "\n" for x in lines)))
    structure_process.main()
    ready, *answers = capsys.readouterr().out.splitlines()
    first, second, third = map(json.loads, answers)
    assert ready == "ready" and first is None and third is None
    assert "cannot be followed" in second
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
