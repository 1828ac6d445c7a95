"""mor bench: speed of decoding and what it is compared with."""

import pytest

from mor.cli import main
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
