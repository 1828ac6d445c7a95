"""Static batches end with their longest request."""

import pytest

from mor.engine import Engine, EngineConfig, SamplingParams, Status
from tests.conftest import tiny


@pytest.mark.parametrize("batching", ["lock_step", "static"])
def test_a_static_batch_ends_with_its_longest_request(batching):
    engine = Engine(tiny(), config=EngineConfig(max_num_seqs=2, batching=batching))
    long, short, late = (
        engine.add_request([1], SamplingParams(max_new_tokens=n, temperature=0)) for n in (9, 3, 3)
    )
    while late.status is Status.WAITING:
        engine.step()
    assert short.status is Status.FINISHED
    assert (long.status is Status.FINISHED) == (batching == "static")
