"""mor generate: text as it comes, or the depth of every token."""

import json
import re

import pytest

from mor.cli import main
from tests.cli.printed import last_json


def test_generate_streams_or_shows_depths(run, capsys):
    common = ["generate", str(run / "run"), "--prompt", "The square", "--max-new-tokens", "12"]
    main(common)
    streamed = capsys.readouterr().out
    main([*common, "--json"])
    found = last_json(capsys)
    assert streamed == "The square" + found["text"] + "\n"
    assert set(found["depths"]) <= {1, 2} and found["mean_depth"] == sum(found["depths"]) / len(
        found["depths"]
    )
    main([*common, "--show-depth"])
    shown = capsys.readouterr().out
    assert "depth" in shown and "mean depth" in shown and "¹" in shown, (
        "without colours depths are digits"
    )


def test_a_prompt_is_not_echoed_before_the_options_are_checked(run, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["generate", str(run / "run"), "--prompt", "The square", "--max-depth", "9"])
    printed = capsys.readouterr()
    assert printed.out == "" and "max_depth must be a whole number in 1..2, got 9" in printed.err


def test_stop_strings_and_structures_from_the_command_line(run, tmp_path, capsys):
    common = ["generate", str(run / "run"), "--prompt", "The square", "--max-new-tokens", "40"]
    main([*common, "--json"])
    text = last_json(capsys)["text"]
    stop = text[3:6]
    main([*common, "--stop", "never there", stop])
    assert capsys.readouterr().out == "The square" + text[: text.index(stop)] + "\n"
    main([*common, "--stop", stop, "--json"])
    found = last_json(capsys)
    assert (found["finish_reason"], found["stop_reason"]) == ("stop", stop)
    main([*common, "--regex", " of [0-9]{2}!"])
    assert re.fullmatch(r"The square of \d\d!\n", capsys.readouterr().out)
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"type": "boolean"}, "maxItems": 1}')
    main([*common, "--json-schema", str(schema), "--json"])
    assert json.loads(last_json(capsys)["text"]) in ([], [True], [False])
    schema.write_text('{"type": "no such"}')
    for flags, words in (
        (["--json-schema", str(schema)], "cannot be followed: Invalid type: no such"),
        (["--json-schema", str(schema), "--regex", "a"], "give one of --json-schema, --grammar"),
        (["--grammar", str(tmp_path / "none")], "there is no"),
    ):
        with pytest.raises(SystemExit):
            main([*common, *flags])
        printed = capsys.readouterr()
        assert printed.out == "" and words in printed.err
