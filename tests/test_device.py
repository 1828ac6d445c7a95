"""What a device can do at most."""

import pytest
import torch

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
