"""mor presets: names and sizes."""

from mor.cli import main
from mor.costs.flops import unique_params
from mor.model.config import PRESET_NAMES, preset
from tests.cli.printed import found_json


def test_presets_are_listed_with_their_sizes(capsys):
    rows = found_json(capsys, "presets")
    assert [row["preset"] for row in rows] == list(PRESET_NAMES)
    sizes = {size["num_recursions"]: size for size in rows[1]["sizes"]}
    assert sizes[3]["layout"] == "1+10x3+1"
    assert sizes[1]["params"] == unique_params(preset("smollm-360m")) == 361_821_120
    main(["presets"])
    shown = capsys.readouterr().out
    assert "smollm-1.7b" in shown and "…" not in shown
