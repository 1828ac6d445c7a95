"""Settings of requests that no tensor can hold."""

import pytest

from mor.engine import SamplingParams


@pytest.mark.parametrize("setting", [dict(seed=2**63), dict(top_k=2**63), dict(top_k=-1)])
def test_sampling_settings_that_no_tensor_holds_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SamplingParams(**setting)
