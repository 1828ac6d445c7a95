"""mor generate: text as it comes, or the depth of every token."""

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
