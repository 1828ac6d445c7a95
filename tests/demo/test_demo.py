"""The demo: what it trains, prints, draws and leaves behind, at a toy budget."""

from pathlib import Path

import pytest

from mor.cli import main
from mor.demo import demo


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
