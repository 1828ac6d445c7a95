"""What a frozen source says is computed once, and belongs to that source."""

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
    assert len(cache.place) == 3 and cache.nbytes == 3 * 11 * (2 * 24 + 4)

    with (tmp_path / "c" / "records.bin").open("ab") as file:
        file.write(b"half a record")  # of a run that was killed
    again = SourceCache(tmp_path / "c", model, 11)
    monkeypatch.setattr(again, "model", None)  # nothing is left to compute
    for a, b in zip(again.of(batch), cache.of(batch), strict=True):
        assert torch.equal(a, b)
    other = Batch(batch.tokens_BT, batch.targets_BT.roll(1, 0))
    with pytest.raises(AttributeError):
        again.of(other)


def test_two_that_share_a_folder_each_add_what_is_missing(tmp_path):
    model = tiny("gain", deepened=True, lora_rank=3).requires_grad_(False)
    batch = batch_of(model)
    rows = [Batch(*(x[[i]] for x in batch[:2])) for i in range(3)]
    first, second = (SourceCache(tmp_path, model, 11) for _ in range(2))
    alone = [first.of(rows[0]), second.of(rows[1]), first.of(rows[2]), second.of(rows[2])]
    assert (tmp_path / "names.bin").stat().st_size == 3 * 16
    again = SourceCache(tmp_path, model, 11)
    again.model = None  # nothing is left to compute
    assert again.records.stat().st_size == again.nbytes
    for row, found in zip((0, 1, 2, 2), alone, strict=True):
        assert torch.equal(again.of(rows[row]).entered_BTD, found.entered_BTD)
        torch.testing.assert_close(again.of(rows[row]).nll_each, found.nll_each, rtol=0, atol=0)


def test_a_cache_of_another_source_is_refused(tmp_path):
    model = tiny("gain", deepened=True, lora_rank=3).requires_grad_(False)
    SourceCache(tmp_path, model, 11)
    for name, parameter in model.named_parameters():
        if "deepening" in name or "lora" in name or "router" in name:
            parameter.add_(1.0)
    SourceCache(tmp_path, model, 11)  # what is trained is not of the source
    with pytest.raises(ValueError, match="another seq_len"):
        SourceCache(tmp_path, model, 12)
    model.coda[0].feed_forward.up_proj.weight[0, 0] += 0.01
    with pytest.raises(ValueError, match="another source"):
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
