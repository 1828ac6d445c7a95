"""Figures of every analysis, and the page that collects what a folder holds."""

import csv
import json
import math
import re
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny
from matplotlib import image
from matplotlib.colors import to_rgb
from test_corpus_analysis import TEXT, WINDOW

from mor import checkpoint
from mor.analysis import style
from mor.analysis.report import ENTRIES, analyses, report_page, run_tables, write, write_table
from mor.checkpoint import Checkpoint
from mor.cli import main
from mor.data.sources import Document
from mor.data.stream import tokenize
from mor.data.tokenizer import byte_tokenizer
from mor.studies import figures as study_figures
from mor.studies.captions import CAPTIONS
from mor.studies.scaling import Optimum, Point

ALL = ENTRIES.keys() - {"loss", "router_health"}
FITS = {
    "expert_choice": ALL,
    "token_choice": ALL - {"agreement"},
    "random": ALL - {"agreement", "score_histogram", "separation"},
    "fixed": {"depth_scaling", "counterfactual_gains", "drift", "kv_similarity"},
    "vanilla": {"drift"},
}


def loaded(kind):
    depth = {"num_recursions": 1} if kind == "vanilla" else {}
    model = tiny("fixed" if kind == "vanilla" else kind, vocab_size=257, **depth)
    return Checkpoint(model.config, model, byte_tokenizer())


@pytest.fixture(scope="module")
def data():
    return tokenize([Document(str(i), TEXT[i:] * 3) for i in range(4)], byte_tokenizer())


@pytest.mark.parametrize("kind", FITS)
def test_every_analysis_that_fits_a_model_gives_a_table_and_a_figure(kind, data, tmp_path):
    tables = analyses(loaded(kind), data, seq_len=WINDOW, max_windows=4)
    assert tables.keys() == FITS[kind]
    write(tmp_path, tables)
    assert {p.stem for p in (tmp_path / "tables").iterdir()} == tables.keys()
    drawn = {name for name in tables if ENTRIES[name].figure}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        f"{n}.{kind}" for n in drawn for kind in ("svg", "png")
    }
    for name in drawn:
        picture = image.imread(tmp_path / "figures" / f"{name}.png")[..., :3]
        assert picture.std() > 0.02, f"{name} is blank"
        words = re.findall(r">([^<]+)</text>", (tmp_path / "figures" / f"{name}.svg").read_text())
        units = ("recursion", "share", "nats", "token", "cosine", "depth", "layer", "score")
        assert any(unit in word for unit in units for word in words), f"{name} has no labelled axis"


def test_the_same_tables_give_the_same_files(data, tmp_path):
    tables = analyses(loaded("fixed"), data, seq_len=WINDOW, max_windows=3)
    for folder in ("a", "b"):
        write(tmp_path / folder, tables)
    for file in (tmp_path / "a").rglob("*.*"):
        assert (
            file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
        ), file.name


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


def metrics(router):
    health = {"depth_entropy": 0.9, "agreement": 0.8, "dead_positions": 0.0} if router else {}
    shares = [1.0, 0.7, 0.3] if router else [1.0]
    for step in (1, 2):
        yield {
            "step": step,
            "tokens": step * 10,
            "loss": 3.0 / step,
            "share_per_recursion": shares,
        } | health
        yield {"step": step, "tokens": step * 10, "validation_nll": 3.1 / step}


def test_metrics_of_a_run_give_a_loss_curve_and_router_health_where_there_is_a_router(tmp_path):
    for router in (True, False):
        (tmp_path / "metrics.jsonl").write_text(
            "".join(json.dumps(m) + "\n" for m in metrics(router))
        )
        tables = run_tables(tmp_path)
        assert tables.keys() == ({"loss", "router_health"} if router else {"loss"})
        write(tmp_path / str(router), tables)
        svg = (tmp_path / str(router) / "figures" / "loss.svg").read_text()
        assert "nats per token" in svg and "training tokens" in svg


def test_the_command_reports_a_run_and_collects_again_without_analysing(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    model = tiny("expert_choice", vocab_size=257)
    checkpoint.save(run / "checkpoints" / "step-00000002", model, byte_tokenizer())
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics(True)))
    (tmp_path / "text.txt").write_text(TEXT * 6)
    main(
        [
            "report",
            str(run),
            "--data",
            str(tmp_path / "text.txt"),
            "--seq-len",
            "24",
            "--max-windows",
            "4",
        ]
    )
    page = (run / "report.html").read_text()
    assert (
        all(f'id="{name}"' in page for name in ENTRIES)
        and "1.5500" in page
        and "collapsed" not in page
    )
    assert "report.html" in capsys.readouterr().out
    (run / "tables" / "extra.csv").write_text("a,b\n1,2\n")
    main(["report", str(run), "--no-analyse", "--out", str(tmp_path / "again.html")])
    assert 'id="extra"' in (tmp_path / "again.html").read_text()


@pytest.mark.parametrize("length", [1, 24])
def test_a_collapsed_router_is_reported_as_one(length, tmp_path):
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
    with (tmp_path / "tables" / "separation.csv").open(newline="") as file:
        assert [row["recursion"] for row in csv.DictReader(file)] == ["2"], (
            "nothing was scored for recursion 3"
        )
    assert 'id="score_histogram"' in page and 'id="kv_similarity"' not in page, (
        "nothing is left of an older report"
    )


@pytest.mark.parametrize("broken", ["embedding.weight", "recursions.router"])
def test_a_model_that_gives_no_numbers_is_refused(broken, tmp_path, capsys):
    model = tiny("expert_choice", vocab_size=257)
    with torch.no_grad():
        [p for name, p in model.named_parameters() if name.startswith(broken)][-1].fill_(math.nan)
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


def test_names_of_rows_and_families_stand_in_the_figures_as_they_are(tmp_path):
    names = ["_hidden", r"$\foo$", "a $1 b"]
    run = dict(
        validation_nll=1.0, answers_right_by_hops=[0.5, 1.0], mean_depth_by_hops=[1.0, 1.5, 2.0]
    )
    rows = [
        SimpleNamespace(row=n, nll=1.0, difference=0.1, difference_low=None, difference_high=None)
        for n in names
    ]
    points = [
        Point(family=n, size=s, budget=1e12, tokens=1e6, nll=(s - 2e6) ** 2)
        for n in names
        for s in (1e6, 2e6, 4e6)
    ]
    bounds = dict.fromkeys(
        ("size", "size_low", "size_high", "tokens", "tokens_low", "tokens_high"), 2e6
    )
    best = [
        Optimum(family=name, budget=1e12, nll=0.0, inside=True, no_minimum=0.0, **bounds)
        for name in names
    ]
    runs = {name: {0: run} for name in names}
    for kind, figure in {
        "rows": study_figures.rows_figure(rows, runs),
        "hops": study_figures.hops_figure(rows, runs),
        "isoflop": study_figures.isoflop_figure(points, best, size_name="size"),
        "paths": study_figures.paths_figure(best, size_name="size"),
    }.items():
        style.save(figure, tmp_path, kind)
        svg = (tmp_path / f"{kind}.svg").read_text()
        assert all(f">{name}</text>" in svg for name in names), kind


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["missing"], "not a folder"), ([".", "--max-windows", "0"], "at least 1")],
)
def test_mistakes_end_in_one_line_that_helps(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["report", *arguments])
    assert words in capsys.readouterr().err


def test_every_line_of_a_large_study_has_its_own_look():
    looks = [
        tuple(sorted((name, str(value)) for name, value in style.series(i).items()))
        for i in range(24)
    ]
    assert len(set(looks)) == 24


# Machado and others (2009), on linear RGB: what dichromats see.
BLINDNESS = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "none": np.eye(3),
}
TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
) / np.array([[0.9505], [1.0], [1.089]])


def lab(colour, blindness):
    """CIELAB of a colour as somebody sees it."""
    value = np.array(to_rgb(colour))
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(TO_XYZ @ np.clip(np.array(blindness) @ linear, 0, 1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_are_told_apart_by_everybody(blindness):
    seen = [lab(colour, BLINDNESS[blindness]) for colour in style.COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15


def test_names_at_the_ends_of_lines_keep_their_order_and_their_distance():
    places = np.array([0.5, 0.1, 0.52, 0.9, 0.51])
    moved = style.apart(places, 0.1)
    assert (np.argsort(moved) == np.argsort(places)).all()
    assert np.diff(np.sort(moved)).min() == pytest.approx(0.1)
    assert moved[1] == 0.1 and moved[3] == 0.9, "only where names would overlap"
    assert moved[[0, 2, 4]].mean() == pytest.approx(0.51)


def line_of(row, nll, difference=None):
    return SimpleNamespace(
        row=row, nll=nll, difference=difference, difference_low=None, difference_high=None
    )


def test_rows_are_sorted_with_the_controls_apart_and_the_reference_named():
    lines = [line_of("b", 2.0), line_of("one pass", 9.0), line_of("a", 1.0), line_of("MoR", 3.0)]
    runs = {line.row: {0: {"validation_nll": line.nll}} for line in lines}
    figure = study_figures.rows_figure(
        lines, runs, title="Gates", reference="MoR", controls=["MoR", "one pass"]
    )
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["MoR", "one pass", "a", "b"]
    gaps = np.diff(left.get_yticks())
    assert gaps[1] > gaps[0] == gaps[2]
    assert "difference from 'MoR'" in right.get_xlabel() and figure.get_suptitle() == "Gates"


def hops_runs(seed):
    return dict(answers_right_by_hops=[1.0, 0.5 + 0.1 * seed], mean_depth_by_hops=[None, 1.0, 2.0])


@pytest.mark.parametrize(("count", "panels"), [(5, 2), (7, 16)])
def test_more_than_five_rows_by_hops_get_a_panel_each(count, panels):
    lines = [line_of(f"row {i}", 1.0) for i in range(count)]
    runs = {line.row: {seed: hops_runs(seed) for seed in range(3)} for line in lines}
    figure = study_figures.hops_figure(lines, runs, compared="row 0")
    assert len(figure.axes) == panels
    used = [axes for axes in figure.axes if axes.get_visible()]
    assert len(used) == (2 if count == 5 else 14), "four and three, each above its depth"
    assert all(axes.collections for axes in used), "the spread of the seeds"
    widest = max(len(axes.lines) for axes in used)
    assert widest == (5 if count == 5 else 2), "its own line and the one compared"


def test_a_best_size_far_outside_does_not_stretch_the_axis():
    points = [
        Point(family="x", size=s, budget=1e12, tokens=1e6, nll=1.0 + s / 1e7)
        for s in (1e6, 2e6, 4e6)
    ]
    bounds = dict.fromkeys(("size_low", "size_high", "tokens", "tokens_low", "tokens_high"), 2e6)
    far = Optimum(
        family="x", budget=1e12, size=10.0, nll=0.5, inside=False, no_minimum=0.0, **bounds
    )
    figure = study_figures.isoflop_figure(points, [far], size_name="size")
    low, high = figure.axes[0].get_xlim()
    assert low > 5e5 and high < 8e6
    assert figure.axes[0].lines[-1].get_marker() == "<", "an arrow at the edge"


def test_small_figures_stand_beside_each_other_and_wide_ones_alone(tmp_path):
    for name, width in (("small", 6.4), ("large", 9.6)):
        style.save(style.new_figure(name, width), tmp_path / "figures", name)
    page = report_page(tmp_path)
    assert '<section id="large" class="wide">' in page and '<section id="small">' in page


def test_captions_of_studies_are_given_by_who_knows_studies(tmp_path):
    write_table([{"row": "a"}], tmp_path / "tables" / "rows.csv")
    assert "<h2>Rows</h2>" in report_page(tmp_path)
    assert "<h2>Rows of the study</h2>" in report_page(tmp_path, entries=CAPTIONS)
