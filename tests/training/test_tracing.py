"""A trace of some steps, after the first ones."""

import gzip
import json

import pytest

from mor.training.loop import train
from mor.training.tracing import SKIPPED
from tests.training.small_run import quiet, settings


def optimizer_steps(file):
    """How many steps of the optimizer a trace holds."""
    with gzip.open(file) as trace:
        events = json.load(trace)["traceEvents"]
    return sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events)


def test_a_run_writes_a_trace_of_as_many_steps_as_asked(squares, tmp_path):
    console = quiet()
    config = settings(squares, tmp_path / "run", steps=SKIPPED + 4, profile=2, eval_every=100)
    train(config, console=console)
    file = tmp_path / "run" / "trace.json.gz"
    assert optimizer_steps(file) == 2
    assert f"trace of up to 2 steps: {file}" in console.file.getvalue()


@pytest.mark.parametrize(("steps", "traced"), [(1, 0), (SKIPPED, 0), (SKIPPED + 1, 1)])
def test_a_run_that_ends_before_writes_what_there_is(squares, tmp_path, steps, traced):
    console = quiet()
    train(settings(squares, tmp_path / "run", steps=steps, profile=9), console=console)
    file = tmp_path / "run" / "trace.json.gz"
    assert (optimizer_steps(file) if file.exists() else 0) == traced
    assert ("no trace: it begins after 3 steps" in console.file.getvalue()) == (not traced)


def test_without_the_setting_there_is_none(squares, tmp_path):
    train(settings(squares, tmp_path / "run", steps=SKIPPED + 2), console=quiet())
    assert not (tmp_path / "run" / "trace.json.gz").exists()


def test_a_trace_that_cannot_be_written_is_a_warning(squares, tmp_path):
    config = settings(squares, tmp_path / "run", steps=SKIPPED + 1, profile=1)
    (tmp_path / "run" / "trace.json.gz").mkdir(parents=True)
    with pytest.warns(UserWarning, match="there is no trace"):
        assert train(config, console=quiet()).finished
