"""`mor calibrate`, and --depth where a model runs."""

import csv
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
    curve = ["eval", str(own / "run"), "--depth", "1,1.5,full", "--max-windows", "4", "--out"]
    main([*curve, str(own / "curve.csv")])
    with (own / "curve.csv").open(newline="") as file:
        assert [row["depth"] for row in csv.DictReader(file)] == ["1.0", "1.5", "full"]
    main([*curve, str(own / "curve.svg")])
    drawn = (own / "curve.svg").read_text()
    assert "mean depth spent" in drawn and "microseconds per token" in drawn
    generate = ["generate", str(own / "run"), "--prompt", "The", "--max-new-tokens", "4", "--json"]
    main([*generate, "--depth", "100%"])
    assert set(last_json(capsys)["depths"]) <= {1, 2, 3}
    main([*generate, "--depth", "full"])
    assert set(last_json(capsys)["depths"]) == {2}

    page = ["explain", str(own / "run"), "--text", "The square of 3", "--json"]
    main(page)
    (found,) = last_json(capsys)["models"]
    asked = [budget["asked"] for budget in found["budgets"]]
    assert asked == [1.0, 1.5, 2.0, "full", 3.0, 4.0], "a few of those that it can have"
    main([*page, "--depths", "1,full"])
    (found,) = last_json(capsys)["models"]
    assert [budget["mean_depth"] for budget in found["budgets"]] == [1, 2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "RUN", "--depth", "1,2", "--out", "curve.pdf"], "written as .svg, .png, .csv"),
        (["eval", "RUN", "--out", "a.svg"], "--out has no effect without --tasks or --depth"),
        (["explain", "RUN", "--text", "a", "--depths", "1.5"], "run mor calibrate"),
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


def test_kinds_are_fields_of_records_and_large_enough(own, tmp_path, capsys):
    (tmp_path / "plain.txt").write_text("".join(f"Line {i}.\n\n" for i in range(90)))
    rows = [{"text": f"{i} and {i + 1}. " * 12, "source": "a"} for i in range(60)]
    rows.append({"text": "b", "source": "rare"})
    (tmp_path / "rare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    many = [row | {"source": f"kind {i}"} for i, row in enumerate(rows)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    before = checkpoint.load(own / "run").model.depth_table
    for name, said in (
        ("plain.txt", "plain.txt is plain text, which has no fields"),
        ("rare.jsonl", "rare: the data"),
        ("many.jsonl", "61 kinds, the first 'kind 0'"),
    ):
        with pytest.raises(SystemExit):
            text = ["--data", str(tmp_path / name), "--kind-field", "source", "--seq-len", "32"]
            main(["calibrate", str(own / "run"), *text, "--max-windows", "16"])
        assert said in capsys.readouterr().err
    assert checkpoint.load(own / "run").model.depth_table == before


@pytest.mark.filterwarnings("always:fitted to")
def test_a_lengthened_run_keeps_the_table_of_the_step_it_starts_from(own, tmp_path, capsys):
    shutil.copytree(own / "run", tmp_path / "run", symlinks=True)
    main(["calibrate", str(tmp_path / "run"), "--seq-len", "32", "--max-windows", "1"])
    assert "fitted to 32 tokens alone: with fewer than 1,024" in capsys.readouterr().err
    start = checkpoint.resolve(tmp_path / "run")
    table = checkpoint.load(start).model.depth_table
    main(["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "10", "--keep", "0"])
    assert table is not None and checkpoint.load(start).model.depth_table == table
    newest = checkpoint.resolve(tmp_path / "run")
    assert newest != start and checkpoint.load(newest).model.depth_table is None
