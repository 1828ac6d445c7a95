"""Which devices there are, and which kernels they prefer."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from mor import device


def test_cudnn_comes_first_on_hopper_only(monkeypatch):
    usual = torch._C._get_sdp_priority_order()
    for major, first in {9: SDPBackend.CUDNN_ATTENTION.value, 8: usual[0]}.items():
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device, major=major: (major, 0)
        )
        with device.preferred_kernels(torch.device("cuda")):
            assert torch._C._get_sdp_priority_order()[0] == first
    with device.preferred_kernels(torch.device("cpu")):
        assert torch._C._get_sdp_priority_order() == usual
    assert torch._C._get_sdp_priority_order() == usual


def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("tpu", "cuda:77", "meta", "", "cpu:x"):
        with pytest.raises(ValueError, match=rf"no device '{name}' .*; it has cpu, cuda:0, cuda:1"):
            device.pick_device(name)
    assert device.pick_device("cpu") == torch.device("cpu")
    assert device.pick_device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")
