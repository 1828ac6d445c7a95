"""The page that collects what a folder holds, and its tables."""

import csv
import math
import re

import pytest
import torch

from mor import checkpoint
from mor.analysis import style
from mor.analysis.report import ENTRIES, analyses, report_page, write, write_table
from mor.checkpoint import Checkpoint
from mor.cli import main
from mor.data.corpus import tokenize
from mor.data.sources import Document
from mor.data.tokenizer import byte_tokenizer
from tests.analysis.small_corpus import TEXT, WINDOW
from tests.conftest import tiny


def loaded(kind):
    depth = {"num_recursions": 1} if kind == "vanilla" else {}
    model = tiny("fixed" if kind == "vanilla" else kind, vocab_size=257, **depth)
    return Checkpoint(model.config, model, byte_tokenizer())


@pytest.fixture(scope="module")
def data():
    return tokenize([Document(str(i), TEXT[i:] * 3) for i in range(4)], byte_tokenizer())


def test_the_same_tables_give_the_same_files(data, tmp_path):
    tables = analyses(loaded("vanilla"), data, seq_len=WINDOW, max_windows=3)
    assert ENTRIES["drift"].figure and tables.keys() == {"drift"}
    for folder in ("a", "b"):
        write(tmp_path / folder, tables)
    for file in (tmp_path / "a").rglob("*.*"):
        assert (
            file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
        ), file.name


def test_states_that_overflow_end_a_report_with_their_table(data):
    model = tiny("expert_choice", vocab_size=257)
    with torch.no_grad():
        model.recursions.shared_blocks[0].feed_forward.down_proj.weight.mul_(1e37)
    broken = Checkpoint(model.config, model, byte_tokenizer())
    with pytest.raises(ValueError, match=r"relative_change of drift is (inf|nan): the states"):
        analyses(broken, data, seq_len=WINDOW, max_windows=1)


def test_tables_keep_every_column_and_value(tmp_path):
    write_table([{"a": 1, "b": [0.5, 1]}, {"a": None, "c": "x,y"}], tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"a": "1", "b": "[0.5, 1]", "c": ""},
            {"a": "", "b": "", "c": "x,y"},
        ]


def test_a_folder_is_collected_whatever_its_files_are_called(tmp_path):
    with pytest.raises(ValueError, match=r"no figures/\*.svg"):
        report_page(tmp_path)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "my_curve.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "figures" / "my_curve.png").write_bytes(b"png")
    (tmp_path / "figures" / "only.png").write_bytes(b"png")
    write_table(
        [{"x": i, "y": math.pi * i, "label": "<b>"} for i in range(100)],
        tmp_path / "tables" / "my_curve.csv",
    )
    write_table(
        [{"depth": 1, "tokens": 3, "share": 1.0}], tmp_path / "tables" / "depth_histogram.csv"
    )
    page = report_page(tmp_path, settings={"lr": "<1"})
    assert (
        page.index('id="depth_histogram"') < page.index('id="my_curve"') < page.index('id="only"')
    )
    assert page.count("<img") == 2 and page.count("data:image/svg+xml") == 1, (
        "the drawing, not the picture of it"
    )
    assert "100 rows" in page and "314.2" not in page and "311" in page, (
        "beginning and end of a long table"
    )
    assert "<b>" not in page and "&lt;b&gt;" in page and "&lt;1" in page
    assert not re.search(r"(src|href)=[\"'](?!#|data:)|url\(|@import|<script", page)


def test_an_empty_table_is_shown_as_one(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "nothing.csv").write_text("")
    assert "0 rows" in report_page(tmp_path)


@pytest.mark.parametrize("length", [1, 24])
def test_a_collapsed_router_is_reported_as_one(length, tmp_path, undrawn):
    model = tiny("expert_choice", vocab_size=257)
    model.router.threshold_R.fill_(1)
    checkpoint.save(tmp_path / "checkpoints" / "step-00000002", model, byte_tokenizer())
    (tmp_path / "text.txt").write_text(TEXT * 2)
    write_table([{"layer": 0}], tmp_path / "tables" / "kv_similarity.csv")
    source = ["--data", str(tmp_path / "text.txt"), "--seq-len", str(length), "--max-windows", "4"]
    main(["report", str(tmp_path), *source])
    page = (tmp_path / "report.html").read_text()
    assert (
        "<dt>router collapsed</dt><dd>none of the" in page
        and "tokens takes recursion 2 or 3</dd>" in page
    )
    assert f"unknown; mor calibrate {tmp_path} measures them" in page, "it has no table of depths"
    with (tmp_path / "tables" / "separation.csv").open(newline="") as file:
        assert [row["recursion"] for row in csv.DictReader(file)] == ["2"], (
            "nothing was scored for recursion 3"
        )
    assert 'id="score_histogram"' in page and 'id="kv_similarity"' not in page, (
        "nothing is left of an older report"
    )


@pytest.mark.parametrize("broken", ["prelude.0.attention.v_proj", "recursions.shared_blocks.0"])
def test_a_model_that_gives_no_numbers_is_refused(broken, tmp_path, capsys):
    model = tiny("expert_choice", vocab_size=257)
    with torch.no_grad():  # finite, which its products are not
        [p for name, p in model.named_parameters() if name.startswith(broken)][-1].fill_(3e38)
    run = checkpoint.save(
        tmp_path / "checkpoints" / "step-00000002", model, byte_tokenizer()
    ).parent.parent
    (tmp_path / "text.txt").write_text(TEXT)
    for command in (
        ["report", "--seq-len", "24", "--data"],
        ["explain", "--out", str(tmp_path / "page.html"), "--file"],
    ):
        with pytest.raises(SystemExit):
            main([command[0], str(run), *command[1:], str(tmp_path / "text.txt")])
        assert "gives values that are not finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_small_figures_stand_beside_each_other_and_wide_ones_alone(tmp_path):
    for name, width in (("small", 6.4), ("large", 9.6)):
        style.save(style.new_figure(name, width), tmp_path / "figures", name)
    page = report_page(tmp_path)
    assert '<section id="large" class="wide">' in page and '<section id="small">' in page
