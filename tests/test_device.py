"""Which device is picked, and which kernels it prefers."""

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


def test_a_gpu_named_by_its_number_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # as if the machine had them
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cuda:1", "cuda", "cpu"):
        assert device.pick_device(name) == torch.device(name)
    assert current == [torch.device("cuda", 1)]
