"""mor generate: text as it comes, or the depth of every token."""

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
