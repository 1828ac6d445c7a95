"""mor bench: speed of decoding and what it is compared with."""

import pytest

from mor.cli import main
from mor.engine import bench
from tests.cli.printed import last_json


def test_bench_decode(run, capsys):
    short = ["--rounds", "1", "--seconds", "0.05", "--batches", "2", "--lengths.mean", "6"]
    main(
        [
            "bench",
            "decode",
            "--preset",
            "tiny",
            "--num-layers",
            "6",
            "--recursions",
            "2",
            *short,
            "--json",
        ]
    )
    found = last_json(capsys)
    assert [row["model"] for row in found["rows"]] == ["vanilla", "mor-2"] * 2
    assert {"tokens_per_s", "speedup", "limit", "mean_depth", "block_only_speedup"} <= found[
        "rows"
    ][1].keys()
    assert found["machine"]["threads"] >= 1
    main(
        [
            "bench",
            "decode",
            "--checkpoint",
            str(run / "run"),
            "--baseline",
            str(run / "run"),
            *short,
        ]
    )
    shown = capsys.readouterr().out
    assert "speedup" in shown and max(map(len, shown.splitlines())) <= 80
    with pytest.raises(SystemExit):
        main(["bench", "decode", "--checkpoint", str(run / "run")])
    assert "go together" in capsys.readouterr().err


def test_bench_decode_has_a_row_for_each_depth(capsys, monkeypatch):
    """The models of presets route at random, which needs no calibration."""
    shape = ["--preset", "tiny", "--num-layers", "6", "--recursions", "2", "--batches", "4"]
    shape += ["--lengths.mean", "6"]
    short = ["--rounds", "1", "--seconds", "0.1", "--json"]
    loads, turns = [], bench.take_turns
    monkeypatch.setattr(
        bench, "take_turns", lambda some, **how: (loads.extend(some), turns(some, **how))
    )
    main(["bench", "decode", *shape, *short, "--depths", "50%", "full", "3"])
    rows = last_json(capsys)["rows"][:4]
    names = ["vanilla", "mor-2 at 1.0", "mor-2 at full", "mor-2 at 3.0"]
    assert [row["model"] for row in rows] == names
    # So short a round counts a part of the tokens that are under way; its mean depth says little.
    assert all(row["mean_depth"] > 0 and row["tokens_per_s"] > 0 for row in rows)
    asked = [(load.engine.config.depth, load.engine.deepest) for load in loads[:4]]
    assert asked == [(None, 1), (1.0, 2), ("full", 2), (3.0, 4)]
    with pytest.raises(SystemExit):
        main(["bench", "decode", *shape, *short, "--depths", "7"])
    assert "depth=7 cannot be had" in capsys.readouterr().err
