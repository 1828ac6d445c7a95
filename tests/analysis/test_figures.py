"""Figures of every analysis, and of the metrics of a run."""

import json
import re

import pytest
from matplotlib import image

from mor.analysis.report import ENTRIES, analyses, run_tables, write
from mor.checkpoint import Checkpoint
from mor.data.corpus import tokenize
from mor.data.sources import Document
from mor.data.tokenizer import byte_tokenizer
from tests.analysis.small_corpus import TEXT, WINDOW
from tests.conftest import tiny

ALL = ENTRIES.keys() - {"loss", "router_health"}


FITS = {
    "expert_choice": ALL - {"depth_curve"},  # which asks for a calibrated one
    "token_choice": ALL - {"agreement", "depth_curve"},
    "random": ALL - {"agreement", "score_histogram", "separation"},
    "fixed": {"depth_curve", "depth_scaling", "counterfactual_gains", "drift", "kv_similarity"},
    "vanilla": {"drift"},
}


def loaded(kind):
    depth = {"num_recursions": 1} if kind == "vanilla" else {}
    model = tiny("fixed" if kind == "vanilla" else kind, vocab_size=257, **depth)
    return Checkpoint(model.config, model, byte_tokenizer())


@pytest.fixture(scope="module")
def data():
    return tokenize([Document(str(i), TEXT[i:] * 3) for i in range(4)], byte_tokenizer())


UNITS = ("recursion", "share", "nats", "token", "cosine", "depth", "layer", "score")


@pytest.mark.parametrize("kind", sorted(FITS.keys() - {"expert_choice"}))
def test_every_analysis_that_fits_a_model_gives_a_figure_with_labelled_axes(kind, data):
    tables = analyses(loaded(kind), data, seq_len=WINDOW, max_windows=4)
    assert tables.keys() == FITS[kind]
    for name, rows in tables.items():
        if ENTRIES[name].figure is None:
            continue
        axes = ENTRIES[name].figure(rows).axes
        words = [text for a in axes for text in (a.get_xlabel(), a.get_ylabel())]
        assert any(unit in word for unit in UNITS for word in words), f"{name} has no labelled axis"
        assert any(a.has_data() for a in axes), f"{name} is blank"


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k == "expert_choice" else pytest.mark.slow) for k in FITS],
)
def test_every_table_and_figure_is_written_and_not_blank(kind, data, tmp_path):
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
        assert any(unit in word for unit in UNITS for word in words), f"{name} has no labelled axis"


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
