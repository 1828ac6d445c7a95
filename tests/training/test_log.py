"""The log of a run: its rows, and router health in words."""

import math

import pytest

from mor.run_folder import RunFolder
from mor.training.log import MetricsLog, Speed, health_text


def test_rows_after_the_step_come_again_and_what_json_does_not_have_is_null(tmp_path):
    run = RunFolder(tmp_path)
    first = MetricsLog(run, step=0)
    for step in (1, 2, 3):
        first.write(step=step, loss=float(step))
    again = MetricsLog(run, step=2)
    again.write(step=3, loss=math.nan, lr=math.inf, share=[0.5, 0.5])
    assert run.read_metrics() == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": None, "lr": None, "share": [0.5, 0.5]},
    ]


def test_other_ranks_write_nothing(tmp_path):
    MetricsLog(RunFolder(tmp_path), step=0, active=False).write(step=1, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_health_is_shown_as_far_as_it_is_known():
    assert health_text({"mean_depth": 3.0}) == "depth 3.00"
    routed = dict(
        mean_depth=1.5, share_per_recursion=[1.0, 0.5], depth_entropy=0.9, dead_positions=0.25
    )
    assert health_text(routed) == "depth 1.50 (100/50%) · entropy 0.90 · dead 25%"
    assert health_text(routed | dict(agreement=0.875)).endswith(" · agreement 87.5%")
    assert health_text(routed | dict(agreement=None, max_violation=0.1)).endswith(
        "dead 25% · MaxVio 0.10"
    )


def test_the_share_of_the_peak_is_that_of_each_device():
    known = Speed.of(tokens=1000, flops=4e12, elapsed_s=0.5, devices=2, peak=10e12)
    assert known.known == {"tokens_per_s": 2000, "mfu": pytest.approx(0.4)}
    assert known.in_words == "2,000 tok/s · MFU 40.0%"
    unknown = Speed.of(tokens=1000, flops=4e12, elapsed_s=0.5, devices=2, peak=None)
    assert unknown.known == {"tokens_per_s": 2000} and unknown.in_words == "2,000 tok/s"
