"""`mor calibrate`, and --depth where a model runs."""

import json
import shutil

import pytest

from mor import checkpoint
from mor.cli import main
from tests.cli.printed import last_json


@pytest.fixture(scope="module")
def own(run, tmp_path_factory):
    """A copy of the run, whose newest checkpoint is calibrated on its own text."""
    folder = tmp_path_factory.mktemp("calibrated")
    shutil.copytree(run / "run", folder / "run", symlinks=True)
    rows = [{"text": f"{i} and {i + 1}. " * 12, "source": "ab"[i % 2]} for i in range(60)]
    (folder / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_calibrate_writes_a_table_that_depths_follow(own, capsys):
    before = checkpoint.resolve(own / "run")
    weights = (before / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        main(["generate", str(own / "run"), "--prompt", "The", "--depth", "1.5"])
    assert "run mor calibrate" in capsys.readouterr().err
    text = ["--data", str(own / "new.jsonl"), "--kind-field", "source", "--seq-len", "32"]
    main(["calibrate", str(own / "run"), *text, "--max-windows", "16", "--json"])
    found = last_json(capsys)
    assert found["reachable"][0][0] == 1 and set(found["spent"]) == {"held out", "a", "b"}
    folder = checkpoint.resolve(own / "run")
    checkpoint.check_to_continue(folder)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "training_state").is_dir()
    assert checkpoint.load(own / "run").model.depth_table.checked == tuple(found["checked"])

    main(["eval", str(own / "run"), "--depth", "1,1.5,full,4", "--json"])
    rows = last_json(capsys)
    assert [row["depth"] for row in rows] == [1.0, 1.5, "full", 4.0]
    assert [row["mean_depth"] for row in rows[::2]] == [1.0, 2.0] and rows[3]["mean_depth"] == 4
    assert 1.2 < rows[1]["mean_depth"] < 1.8
    main(["eval", str(own / "run"), "--depth", "1,75%"])
    shown = capsys.readouterr().out
    assert "tokens/s" in shown and "1.5" in shown
    generate = ["generate", str(own / "run"), "--prompt", "The", "--max-new-tokens", "4", "--json"]
    main([*generate, "--depth", "100%"])
    assert set(last_json(capsys)["depths"]) <= {1, 2, 3}
    main([*generate, "--depth", "full"])
    assert set(last_json(capsys)["depths"]) == {2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "RUN", "--depth", "half"], "--depth takes a mean depth"),
        (["eval", "RUN", "--depth", "0.5"], "from 1 on"),
        (["eval", "RUN", "--depth", "2", "--by-depth"], "--by-depth has no effect"),
        (["generate", "RUN", "--prompt", "a", "--depth", "full", "--max-depth", "1"], "leave out"),
        (["calibrate", "RUN", "--kind-field", "source"], "--kind-field has no effect"),
    ],
)
def test_what_cannot_be_meant_is_refused(run, words, said, capsys):
    with pytest.raises(SystemExit):
        main([str(run / "run") if word == "RUN" else word for word in words])
    assert said in capsys.readouterr().err
