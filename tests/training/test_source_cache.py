"""What a frozen source says is computed once, and belongs to that source."""

import shutil
import sqlite3
from contextlib import closing

import pytest
import torch

from mor.data.stream import Batch
from mor.training.source_cache import SourceCache
from tests.conftest import tiny
from tests.training.small_run import batch_of


def test_states_and_losses_of_the_source_are_computed_once(tmp_path, monkeypatch):
    model = tiny("gain", deepened=True, lora_rank=3).requires_grad_(False)
    cache, batch = SourceCache(tmp_path / "c", model, 11), batch_of(model)
    twice = Batch(*(x[[0, 1, 2, 1]] for x in batch[:2]))
    found = cache.of(twice)
    output = model(twice.tokens_BT, targets_BT=twice.targets_BT, max_depth=1, keep_states=True)
    torch.testing.assert_close(found.nll_each, output.nll_each, atol=1e-2, rtol=1e-2)
    rounded = dict(entered_BTD=found.entered_BTD, targets_BT=twice.targets_BT, max_depth=1)
    torch.testing.assert_close(model(twice.tokens_BT, **rounded).nll_each, found.nll_each)
    entered_BTD = output.routing.states[0].view_as(found.entered_BTD)
    torch.testing.assert_close(found.entered_BTD, entered_BTD, atol=1e-3, rtol=1e-3)
    skipped = model(twice.tokens_BT, entered_BTD=entered_BTD).logits_BTV
    assert torch.equal(skipped, model(twice.tokens_BT).logits_BTV)
    with pytest.raises(ValueError, match="a state for each token"):
        model(twice.tokens_BT, entered_BTD=entered_BTD[:1])
    assert cache.nbytes == 3 * 11 * (2 * 24 + 4)

    again = SourceCache(tmp_path / "c", model, 11)
    monkeypatch.setattr(again, "model", None)  # nothing is left to compute
    for a, b in zip(again.of(batch), cache.of(batch), strict=True):
        assert torch.equal(a, b)
    other = Batch(batch.tokens_BT, batch.targets_BT.roll(1, 0))
    with pytest.raises(AttributeError):
        again.of(other)


def test_two_that_share_a_folder_each_add_what_is_missing(tmp_path):
    model = tiny("gain", deepened=True, lora_rank=3).requires_grad_(False)
    rows = rows_of(model)
    first, second = (SourceCache(tmp_path, model, 11) for _ in range(2))
    alone = [first.of(rows[0]), second.of(rows[1]), first.of(rows[2]), second.of(rows[2])]
    again = SourceCache(tmp_path, model, 11)
    again.model = None  # nothing is left to compute
    assert again.nbytes == 3 * again.record.itemsize
    for row, found in zip((0, 1, 2, 2), alone, strict=True):
        assert torch.equal(again.of(rows[row]).entered_BTD, found.entered_BTD)
        torch.testing.assert_close(again.of(rows[row]).nll_each, found.nll_each, rtol=0, atol=0)


def rows_of(model):
    batch = batch_of(model)
    return [Batch(*(x[[i]] for x in batch[:2])) for i in range(3)]


def changed(model):
    """Another source, in a late layer, so that what it gives differs little."""
    model.coda[0].feed_forward.up_proj.weight[0, 0] += 0.5
    return model


def test_what_is_trained_is_not_of_the_source_and_all_else_is(tmp_path):
    model = tiny("gain", deepened=True, lora_rank=3).requires_grad_(False)
    row = rows_of(model)[0]
    before = SourceCache(tmp_path, model, 11).of(row)
    for name, parameter in model.named_parameters():
        if "deepening" in name or "lora" in name or "router" in name:
            parameter.add_(1.0)
    assert SourceCache(tmp_path, model, 11).nbytes > 0
    assert SourceCache(tmp_path, model, 11, "bfloat16").nbytes == 0
    other = SourceCache(tmp_path, changed(model), 11)
    assert other.nbytes == 0
    assert not torch.equal(other.of(row).nll_each, before.nll_each)


@pytest.mark.parametrize("harm", ["deleted", "remade", "damaged", "cut", "no folder"])
def test_a_file_that_is_harmed_while_a_run_uses_it_changes_no_value(harm, tmp_path, recwarn):
    model = tiny("gain", deepened=True, lora_rank=3).requires_grad_(False)
    rows, folder = rows_of(model), tmp_path / "c"
    cache = SourceCache(folder, model, 11)
    before = [cache.of(row) for row in rows]
    content = cache.file.read_bytes()
    if harm == "no folder":
        shutil.rmtree(folder)
    else:
        cache.file.unlink()
    if harm == "remade":
        other = tiny("gain", deepened=True, lora_rank=3).requires_grad_(False)
        SourceCache(folder, changed(other), 11).of(rows[1])
        SourceCache(folder, model, 11).of(rows[2])
    elif harm == "damaged":
        cache.file.write_bytes(content[:4096] + bytes(len(content) - 4096))
    elif harm == "cut":
        cache.file.write_bytes(content[: len(content) // 2])
    for _ in range(2):
        for row, was in zip(rows, before, strict=True):
            assert torch.equal(cache.of(row).entered_BTD, was.entered_BTD)
            assert torch.equal(cache.of(row).nll_each, was.nll_each)
    said = [str(w.message) for w in recwarn]
    assert len(said) == (harm in ("damaged", "cut", "no folder"))
    assert all("which takes longer" in words for words in said)


def test_one_byte_that_is_not_what_was_written_is_computed_anew(tmp_path):
    model = tiny("gain", deepened=True, lora_rank=3).requires_grad_(False)
    row = rows_of(model)[0]
    cache = SourceCache(tmp_path, model, 11)
    before = cache.of(row)
    with closing(sqlite3.connect(cache.file)) as database, database:
        (record,) = database.execute("SELECT record FROM records").fetchone()
        database.execute("UPDATE records SET record = ?", [b"\xff" + record[1:]])
    for _ in range(2):
        assert torch.equal(cache.of(row).nll_each, before.nll_each)
    with closing(sqlite3.connect(cache.file)) as database:
        assert database.execute("SELECT record FROM records").fetchone() == (record,)


def test_something_else_in_its_place_is_refused(tmp_path):
    (tmp_path / "source.sqlite").write_text("a diary " * 100)
    model = tiny("gain", deepened=True, lora_rank=3).requires_grad_(False)
    with pytest.raises(ValueError, match=r"source.sqlite cannot be used.*choose another folder"):
        SourceCache(tmp_path, model, 11)


def test_the_source_is_without_adapters_also_where_they_act_at_once(tmp_path):
    model = tiny("fixed", num_recursions=1, lora_rank=3, lora_from=1).requires_grad_(False)
    batch = batch_of(model)
    adapters = {n: p.clone() for n, p in model.named_parameters() if "lora_B" in n}
    model.load_state_dict({n: 0 * p for n, p in adapters.items()}, strict=False)
    want = model(batch.tokens_BT, targets_BT=batch.targets_BT).nll_each
    model.load_state_dict(adapters, strict=False)
    found = SourceCache(tmp_path, model, 11).of(batch)
    torch.testing.assert_close(found.nll_each, want, atol=1e-2, rtol=1e-2)
    adapted = model(batch.tokens_BT, targets_BT=batch.targets_BT).nll_each
    assert (adapted - want).abs().max() > 0.1
