"""Pages: the bytes in use, the count that the host keeps of them, and what it copies."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mor.engine import Engine, EngineConfig, SamplingParams
from mor.engine.attention import gathered_attention
from mor.engine.paged_kv import PagedKV, default_memory
from tests.conftest import tiny


def test_memory_per_token_is_what_costs_says():
    """With pages of one token nothing is rounded up, so the bytes in use are those of the
    entries."""
    from mor.costs import flops as costs

    model = tiny("fixed")
    engine = Engine(
        model, config=EngineConfig(page_size=1, prefix_caching=False, batching="depth_wise")
    )
    request = engine.add_request([1, 2, 3, 4, 5], SamplingParams(max_new_tokens=30, temperature=0))
    while request.num_read < 10:
        engine.step()
    config, took = model.config, int(engine.runner.took_SR[request.slot].sum())
    own = config.prelude_layers + config.coda_layers
    entries = request.num_read * (own + 3 * config.shared_layers)
    entries += own + took * config.shared_layers  # of the token under way
    assert took and engine.kv.used_bytes == entries * costs.kv_entry_bytes(config, 4)
    assert engine.kv.nbytes <= 1 << 30


def test_the_count_of_the_host_changes_when_it_is_refreshed():
    """Not before: on CUDA it cannot, and the CPU does the same."""
    kv = Engine(tiny("fixed"), config=EngineConfig(max_num_seqs=2, page_size=4)).kv
    slots, streams = np.array([0, 1]), np.array([0, 2])
    kv.reserve(slots, streams)
    entries = torch.tensor([True, False])
    kv.append(torch.tensor(slots), torch.tensor(streams), torch.zeros(2).long(), entries, kind=1)
    assert kv.host_count.sum() == 0
    kv.refresh()
    assert kv.host_count.nonzero() == ([0], [0]) and kv.host_count[0, 0] == 1
    kv.free_slot(0)
    assert kv.host_count.sum() == 0
    kv.refresh()
    assert kv.host_count.sum() == 0


class Copies(TorchDispatchMode):
    """Counts copies to another device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        to = (kwargs or {}).get("device")
        if operation._schema.name == "aten::_to_copy" and to not in (None, args[0].device):
            self.count += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kv_strategy", ["recursion_wise", "shared", "hybrid"])
def test_places_reach_the_device_together(kv_strategy):
    """Each copy makes the host wait for a GPU. The device here has no values, but counts."""
    kv = PagedKV(
        tiny(kv_strategy=kv_strategy).config,
        num_slots=4,
        max_len=60,
        page_size=4,
        num_bytes=1 << 20,
        decode_attention=gathered_attention,
        device="meta",
    )
    with Copies() as copies:
        kv.reserve(np.arange(4).repeat(4), np.tile(np.arange(4), 4), np.full(16, 30))
    assert copies.count == 1
    taken = np.ones((8, 3), dtype=bool)
    with Copies() as copies:
        segments = [kv.segment(0, start, taken, np.full(3, start)) for start in (0, 8, 16)]
        kv.free_slot(1)
    assert copies.count == 0
    with Copies() as copies:
        kv.attach(1, segments)
    assert copies.count <= 2 * kv.num_streams + 1  # however many segments
    assert (kv.host_table_RL[4:8, :24] == kv.host_table_RL[:4, :24]).all()


def test_memory_for_keys_and_values_follows_what_a_gpu_has_free(monkeypatch):
    assert default_memory(torch.device("cpu")) == 1 << 30
    for name, value in {
        "mem_get_info": (7000, 9000),
        "memory_reserved": 1000,
        "memory_allocated": 400,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert default_memory(torch.device("cuda", 1)) == int(0.8 * 7600)


def test_a_strategy_that_it_does_not_keep_is_refused():
    with pytest.raises(ValueError, match="yet; decode with"):
        Engine(tiny(kv_strategy="final"))
