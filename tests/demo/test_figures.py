"""The pictures of the demo."""

import json

from matplotlib import image


def test_pictures_and_results_are_written(shown):
    out, _, results = shown
    for name in ("text", "task"):
        assert image.imread(out / f"{name}.png")[..., :3].std() > 0.02, f"{name} is blank"
    assert json.loads((out / "results.json").read_text()) == results
