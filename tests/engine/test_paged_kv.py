"""Pages: the bytes in use, and the count that the host keeps of them."""

import numpy as np
import torch

from mor.engine import Engine, EngineConfig, SamplingParams
from tests.conftest import tiny


def test_memory_per_token_is_what_costs_says():
    """With pages of one token nothing is rounded up, so the bytes in use are those of the
    entries."""
    from mor.costs import flops as costs

    model = tiny("fixed")
    engine = Engine(model, config=EngineConfig(page_size=1, prefix_caching=False))
    request = engine.add_request([1, 2, 3, 4, 5], SamplingParams(max_new_tokens=30, temperature=0))
    while request.num_read < 10:
        engine.step()
    config, took = model.config, int(engine.runner.took_SR[request.slot].sum())
    own = config.prelude_layers + config.coda_layers
    entries = request.num_read * (own + 3 * config.shared_layers)
    entries += own + took * config.shared_layers  # of the token under way
    assert took and engine.kv.used_bytes == entries * costs.kv_entry_bytes(config, 4)
    assert engine.kv.nbytes <= engine.config.kv_cache_memory


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
