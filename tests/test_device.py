"""Which devices there are, and what one can do at most."""

import pytest
import torch

from mor import device
from mor.device import peak_flops_per_s


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Something New", None),
    ],
)
def test_the_peak_of_a_gpu_goes_by_its_full_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops_per_s(torch.device("cuda")) == peak
    assert peak_flops_per_s(torch.device("cpu")) is None


def test_a_device_that_is_not_here_is_refused_with_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("tpu", "cuda:77", "meta", "", "cpu:x", "cpu:5"):
        with pytest.raises(ValueError, match=rf"no device '{name}' .*; it has cpu, cuda:0, cuda:1"):
            device.pick_device(name)
    assert device.pick_device("cpu") == torch.device("cpu")
    assert device.pick_device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_gpu_named_by_its_number_becomes_the_current_one(monkeypatch):
    current = []
    # As if the machine had them.
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cuda:1", "cuda", "cpu"):
        assert device.pick_device(name) == torch.device(name)
    assert current == [torch.device("cuda", 1)]
