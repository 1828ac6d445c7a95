"""Steady loads to measure."""

from types import SimpleNamespace

import pytest
import torch

from mor.costs import flops
from mor.costs.flops import Machine
from mor.engine import bench
from mor.engine.bench import Lengths, decode_rows, load_for
from tests.conftest import tiny


def test_a_steady_load_starts_full():
    load = load_for("", tiny(), batch=24, slots=24, lengths=Lengths(mean=6, deviation=3))
    assert len(load.engine.requests) == 24
    load.turn(0.05)
    assert len(load.engine.requests) == 24


def test_shares_are_those_of_the_tokens_that_came_out():
    load = load_for("", tiny(), batch=4, slots=4, lengths=Lengths(mean=6, deviation=3))
    load.depths.clear()
    load.depths.update({1: 4, 3: 2, 2: 2})
    assert load.shares() == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("batching", ["depth_wise", "lock_step"])
def test_tokens_are_counted_by_their_depth(batching):
    model, lengths = tiny(), Lengths(mean=6, deviation=3)
    load = load_for("", model, batch=4, slots=4, lengths=lengths, batching=batching, depth="full")
    load.turn(0.05)
    assert set(load.depths) == {model.config.num_recursions}
    assert load.depths.total() > 0 and load.shares() == [1.0] * model.config.num_recursions


@pytest.mark.parametrize(
    "settings", [dict(mean=0), dict(mean=float("nan")), dict(deviation=-1), dict(mean="6")]
)
def test_lengths_that_cannot_be_drawn_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Lengths(**settings)


def test_lengths_are_drawn_up_to_twice_the_mean_and_must_fit_the_model():
    drawn = Lengths(mean=6, deviation=1e9).draw(100, torch.Generator().manual_seed(0))
    assert set(drawn) == {2, 12}
    with pytest.raises(ValueError, match="draws up to 64, but a sequence holds 64"):
        load_for("", tiny(), batch=1, slots=1, lengths=Lengths(mean=32))


def test_a_model_whose_logits_are_not_finite_is_not_measured():
    model = tiny()
    torch.nn.init.constant_(model.final_norm.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        load_for("a", model, batch=2, slots=2, lengths=Lengths(mean=6)).turn(0.05)


class Clock:
    """An event of a device whose clock ticks once a millisecond with each thing that it does."""

    ticks = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Clock.ticks

    def synchronize(self): ...

    def elapsed_time(self, end):
        return end.at - self.at


def test_a_machine_with_cuda_is_timed_by_its_own_clock(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Clock)

    def work():
        Clock.ticks += 3

    assert bench._timed(work, torch.device("cuda")) == pytest.approx(0.003)


def test_the_work_that_is_timed_takes_long_on_its_machine():
    """A product of 5 us would time the launch. An H100 does 1e15 operations a second in bfloat16
    and reads 3.4e12 bytes."""
    rows, inner, numbers = bench.machine_sizes(torch.device("cuda"))
    assert 2 * rows * rows * inner / 1e15 > 1e-3 and 4 * numbers / 3.4e12 > 1e-3
    assert 2 * rows * inner + 4 * numbers < 5e9, "it fits beside a model"


def test_the_hosts_time_in_the_device_loop_is_what_lies_outside_its_launches(monkeypatch):
    load = load_for("", tiny(), batch=4, slots=4, lengths=Lengths(mean=6, deviation=3))
    load.engine.runner.model_s, seconds = 1.0, load.engine.measured.seconds
    seconds["sample"], seconds["launch"] = 0.5, 4.0
    assert load._away_s() == 1.5
    monkeypatch.setattr(load.engine, "kv", SimpleNamespace(device=torch.device("cuda")))
    assert load._away_s() == 4.0
    seconds["launch"] = 0.0
    assert load._away_s() == 1.5


def test_batches_beyond_the_memory_are_refused_by_name():
    with pytest.raises(ValueError, match=r"a at batch 1000000000 with 9.*max_num_seqs=9"):
        load_for("a", tiny(), batch=10**9, slots=9 * 10**9, lengths=Lengths(mean=6))


def test_a_model_with_more_keys_and_values_than_the_baseline_still_has_a_slot():
    plain, deep = tiny("fixed", num_recursions=1), tiny("fixed", num_recursions=3)
    lengths = Lengths(mean=12, deviation=2)
    machine = Machine(flops_per_s=1e9, bytes_per_s=1e9)
    settings = dict(batch=1, slots=None, lengths=lengths, machine=machine, rounds=1, seconds=0.01)
    rows = decode_rows(plain, {"deep": deep}, **settings)
    assert [row.slots for row in rows] == [1, 1]
    assert rows[1].kv_bytes_per_token > rows[0].kv_bytes_per_token


def test_bytes_of_keys_and_values_follow_the_depth():
    plain, model = tiny("fixed", num_recursions=1), tiny("random", num_recursions=3)
    machine, lengths = Machine(flops_per_s=1e9, bytes_per_s=1e9), Lengths(mean=6, deviation=2)
    common = dict(lengths=lengths, machine=machine, rounds=1, seconds=0.01)
    depths = [1, 2, "full", 5]
    rows = decode_rows(plain, {"m": model}, batch=4, slots=None, depths=depths, **common)[1:]
    found = [row.kv_bytes_per_token for row in rows]
    assert found == sorted(found) and len(set(found)) == 4
    whole = flops.kv_bytes(model.config, 1, [1.0] * 3, model.embedding.weight.dtype.itemsize)
    assert found[2] == whole and rows[0].slots > rows[3].slots
