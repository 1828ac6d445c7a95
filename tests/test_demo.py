"""The demo: what it trains, prints, draws and leaves behind, at a toy budget."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib import image

from mor.cli import main
from mor.demo import demo
from mor.demo.task import TaskRow, task_table, task_verdict
from mor.demo.text import TextRow, text_verdict
from mor.training.config import load_config


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The folder of a quick demo, the lines that it printed, and its results."""
    out, printed = tmp_path_factory.mktemp("demo") / "demo", io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["demo", "--quick", "--out", str(out), "--json"])
    *lines, last = printed.getvalue().rstrip().splitlines()
    return out, lines, json.loads(last)


def test_the_models_on_text_are_compared_fairly(shown):
    rows = {row["name"]: row for row in shown[2]["text"]["rows"]}
    assert list(rows) == ["vanilla", "recursive", "MoR", "one pass"]
    spent = [row["train_flops"] for row in rows.values()]
    assert max(spent) / min(spent) < 1.2
    routers = rows["MoR"]["params_non_embedding"] - rows["one pass"]["params_non_embedding"]
    assert routers == 3 * 64
    assert rows["vanilla"]["effective_layers"] == rows["MoR"]["effective_layers"] == 8
    assert rows["MoR"]["bits_per_byte_topk"] is not None
    assert rows["vanilla"]["bits_per_byte_topk"] is None


def test_the_models_on_the_task_are_compared_fairly(shown):
    rows = {row["name"]: row for row in shown[2]["task"]["rows"]}
    assert list(rows) == ["one pass", "recursive", "MoR"]
    spent = [row["train_flops"] for row in rows.values()]
    assert max(spent) / min(spent) < 1.2
    params = [row["params_non_embedding"] for row in rows.values()]
    assert params[1] == params[0] and params[2] == params[0] + 4 * 64, "routers"
    assert [row["effective_layers"] for row in rows.values()] == [3, 6, 6]
    assert all(len(row["mean_depth_by_hops"]) == 16 for row in rows.values())
    assert set(rows["recursive"]["mean_depth_by_hops"]) == {4.0}


@pytest.mark.parametrize("part", ["text", "task"])
def test_mor_is_trained_as_recommended(shown, part):
    model = load_config(shown[0] / part / "mor" / "train.json").model
    assert (model.router.kind, model.router.gate, model.router.alpha) == (
        "expert_choice",
        "residual",
        1.0,
    )
    assert model.kv_strategy == "hybrid"


def test_pictures_and_results_are_written(shown):
    out, _, results = shown
    for name in ("text", "task"):
        assert image.imread(out / f"{name}.png")[..., :3].std() > 0.02, f"{name} is blank"
    assert json.loads((out / "results.json").read_text()) == results


def test_the_terminal_shows_tables_of_80_columns_and_how_to_go_on(shown, capsys):
    out, lines, _ = shown
    tables = [line for line in lines if line.startswith(("│", "┃"))]
    assert len(tables) > 15 and max(map(len, tables)) <= 80
    command = lines[-1].removeprefix(f"Go on with: mor explain {out}/task/mor --text '")
    assert command.endswith("'") and command != lines[-1]
    page = str(out / "page.html")
    main(["explain", f"{out}/task/mor", "--text", command.rstrip("'"), "--out", page])
    assert f"{len(command.split())} tokens" in capsys.readouterr().out


def test_a_second_demo_leaves_the_first_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo.free_folder(None) == Path("runs/demo")
    Path("runs/demo/results.json").write_text("{}")
    assert demo.free_folder(None) == Path("runs/demo-2")
    with pytest.raises(ValueError, match=r"runs/demo is not empty; choose another --out"):
        demo.free_folder(Path("runs/demo"))
    assert Path("runs/demo/results.json").read_text() == "{}"


def test_an_interrupted_demo_says_what_is_left(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_text", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--quick", "--out", str(tmp_path / "demo")])
    assert stopped.value.code == 130
    assert "keeps what is trained so far" in capsys.readouterr().out


def text_rows(mean_depth=2.0, **bits_per_byte):
    values = dict.fromkeys(TextRow.__dataclass_fields__, 1.0) | {"mean_depth": mean_depth}
    return [
        TextRow(**values | dict(name=name.replace("_", " "), bits_per_byte_causal=value))
        for name, value in bits_per_byte.items()
    ]


@pytest.mark.parametrize(
    ("one_pass", "words"),
    [(2.2, "depth pays on this text"), (2.09, "within noise"), (2.0, "One pass is better")],
)
def test_the_verdict_on_text_follows_from_the_numbers(one_pass, words):
    said = text_verdict(text_rows(vanilla=2.3, recursive=2.4, MoR=2.1, one_pass=one_pass))
    assert words in said and said.index("MoR 2.100") < said.index("recursive 2.400")


def test_the_verdict_on_text_knows_a_router_that_does_not_use_its_depth():
    said = text_verdict(text_rows(1.02, vanilla=2.3, recursive=2.4, MoR=2.1, one_pass=2.2))
    assert "1.02 recursions" in said and "depth pays" not in said


def task_rows(hard, late):
    """hard: right answers above 8 hops of one pass, recursive and MoR; late: MoR's depth at the
    last four."""
    values = dict.fromkeys(TaskRow.__dataclass_fields__, 1.0)
    made = [
        TaskRow(
            **values
            | dict(
                name=name,
                answers_right_by_hops=[1.0] * 8 + [share] * 8,
                mean_depth_by_hops=[1.0] * 12 + [late] * 4,
            )
        )
        for name, share in zip(("one pass", "recursive", "MoR"), hard, strict=True)
    ]
    return [replace(row, effective_layers=3) for row in made]


def test_the_verdict_on_the_task_follows_from_the_numbers():
    said = task_verdict(task_rows((0.4, 0.9, 0.8), late=3.5))
    assert "one pass 40%, recursive 90%, MoR 80%" in said and "recursive 50 and MoR 40." in said
    assert "sends harder questions deeper: mean depth 1.00 at 1 to 4 hops, 3.50" in said
    only = task_verdict(task_rows((0.4, 0.9, 0.45), late=1.2))
    assert "in one pass: recursive 50." in only and "does not follow the hops" in only
    assert "depth did not pay here" in task_verdict(task_rows((0.4, 0.45, 0.3), late=1.0))


def test_the_table_of_the_task_has_means_over_spans_of_hops():
    cells = task_table(task_rows((0.4, 0.9, 0.8), late=3.5)).columns[-1]
    assert list(cells.cells) == ["40% right", "90% right", "80% right", *["depth 3.50"] * 3]
