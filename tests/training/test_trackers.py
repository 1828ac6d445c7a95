"""Trackers get what the metrics file gets, and histograms of the routing; a missing package names
the extra."""

import io
import json
import os
import resource
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from mor.data.config import DataConfig
from mor.model.config import preset
from mor.run_folder import RunFolder
from mor.training.config import TrainConfig
from mor.training.log import MetricsLog
from mor.training.loop import train
from mor.training.trackers import flat_scalars, routing_histograms
from tests.conftest import random_tokens, tiny


@pytest.fixture
def config(tmp_path):
    text = "".join(
        json.dumps({"text": f"The square of {i} is {i * i}. " * 6}) + "\n" for i in range(40)
    )
    (tmp_path / "a.jsonl").write_text(text)
    return TrainConfig(
        model=preset(
            "tiny", num_recursions=2, router="expert_choice", num_layers=4, max_seq_len=64
        ),
        data=DataConfig(path=str(tmp_path / "a.jsonl"), tokenizer="bytes"),
        out=str(tmp_path / "run"),
        steps=4,
        batch_size=2,
        seq_len=32,
        eval_every=4,
        eval_windows=2,
        log_every=2,
        save_every=2,
        device="cpu",
    )


def run(config, tracker, **settings):
    train(replace(config, tracker=tracker), console=Console(file=io.StringIO()), **settings)


def test_tensorboard_reads_back_what_the_metrics_file_holds(config, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(config, "tensorboard")
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = RunFolder(tmp_path / "run").read_metrics()
    for name in ("loss", "agreement", "validation_nll"):
        expected = [
            (row["step"], pytest.approx(row[name])) for row in rows if row.get(name) is not None
        ]
        assert [(e.step, e.value) for e in events.Scalars(name)] == expected
    assert [e.value for e in events.Scalars("share_per_recursion/2")] == [0.5, 0.5]
    (depth,) = events.Histograms("routing/depth")
    assert (
        depth.step == 4
        and depth.histogram_value.num == 64
        and depth.histogram_value.sum == 32 + 2 * 32
    )
    assert "routing/logit/2" in events.Tags()["histograms"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_with_the_interface_of_wandb(config, tmp_path, monkeypatch, name):
    calls = {"init": [], "log": [], "finish": []}
    fake = SimpleNamespace(
        init=lambda **settings: calls["init"].append(settings),
        log=lambda values, step: calls["log"].append((step, values)),
        finish=lambda: calls["finish"].append(True),
        Histogram=lambda values: ("histogram", len(values)),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    run(config, name)
    (settings,) = calls["init"]
    assert settings["project"] == "mor" and settings["resume"] == "allow"
    assert settings["name"].endswith("-run") and settings["config"]["steps"] == 4
    assert [step for step, values in calls["log"] if "loss" in values] == [2, 4]
    assert not any("step" in values for _, values in calls["log"]), (
        "trackio keeps that name for itself"
    )
    assert [step for step, values in calls["log"] if "validation_nll" in values] == [4]
    assert {step: v["routing/depth"] for step, v in calls["log"] if "routing/depth" in v}[4] == (
        "histogram",
        64,
    )
    assert calls["finish"] == [True]
    run(config, name, resume=True)
    assert calls["init"][1]["name"] == settings["name"], "a resumed run goes on under its name"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_names_the_extra_before_anything_is_written(
    config, tmp_path, monkeypatch, name
):
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"tracker='{name}' needs more packages .*{name}.*\[track\]"
    ):
        run(config, name)
    assert not RunFolder(tmp_path / "run").is_begun


def test_numbers_and_histograms():
    values = {
        "step": 3,
        "share": [1.0, 0.5],
        "nothing": None,
        "bad": float("nan"),
        "on": True,
        "name": "x",
    }
    assert flat_scalars(values) == {"step": 3.0, "share/1": 1.0, "share/2": 0.5}
    for router, logits in {
        "expert_choice": [24, 24, 16],
        "token_choice": [24, 24, 24],
        "fixed": [],
    }.items():
        routing = tiny(router, num_recursions=3)(random_tokens(2, 12), selection="topk").routing
        found = routing_histograms([routing, routing])
        assert np.array_equal(found.pop("routing/depth"), routing.depth.repeat(2).numpy())
        assert [len(v) for v in found.values()] == [2 * n for n in logits]


def test_a_tracker_that_raises_is_named_once_and_training_goes_on(config, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no network")

    fake = SimpleNamespace(init=lambda **_: None, log=fail, finish=fail, Histogram=len)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.warns(UserWarning, match=r"tracker gets nothing more \(no network\)") as said:
        run(config, "wandb")
    assert len([w for w in said if "tracker" in str(w.message)]) == 1
    losses = [row for row in RunFolder(tmp_path / "run").read_metrics() if "loss" in row]
    assert [row["step"] for row in losses] == [2, 4]


def test_a_full_disk_for_metrics_loses_rows_and_no_half_of_one(config, tmp_path):
    folder = RunFolder(tmp_path)
    log = MetricsLog(folder, step=0)
    log.write(step=1, loss=3.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (folder.metrics.stat().st_size + 5, before[1]))
    try:
        with pytest.warns(UserWarning, match=r"metrics.jsonl lacks rows .*; the work goes on"):
            log.write(step=2, loss=2.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.write(step=3, loss=2.0)
    assert [row["step"] for row in folder.read_metrics()] == [1, 3]


def test_training_goes_on_when_nobody_reads_its_lines(config, monkeypatch):
    class Gone(io.StringIO):
        def write(self, _):
            raise BrokenPipeError("the pipe is closed")

    monkeypatch.setattr(os, "dup2", lambda *_: None)  # rich closes the standard output
    with pytest.warns(UserWarning, match="progress is not shown"):
        assert train(config, console=Console(file=Gone())).finished
