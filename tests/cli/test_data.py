"""mor data: shards are prepared, and looked at later."""

import json

import pytest

from mor.cli import main
from tests.cli.printed import last_json


def test_info_shows_what_prepare_wrote(tmp_path, capsys):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    rows = [json.dumps({"text": f"Line {i}."}) for i in range(40)]
    source.write_text("\n".join([*rows, '{"text": ', '{"text": ""}']) + "\n")
    settings = ["--tokenizer", "bytes", "--workers", "1", "--json"]
    main(["data", "prepare", str(source), "--out", str(out), *settings])
    made = last_json(capsys)
    assert sum(split["documents"] for split in made["splits"].values()) == 40
    assert (made["empty"], made["broken"]) == (1, 1)
    main(["data", "info", str(out), "--json"])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == made
    assert "tokenizer bytes" in printed and "broken: " in printed


def test_a_folder_without_shards_is_an_error_of_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["data", "info", str(tmp_path)])
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
