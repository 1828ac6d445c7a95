"""Which devices there are, how they compute, how data get there, and what one can do at most."""

from unittest.mock import Mock

import pytest
import torch

from mor import device
from mor.device import autocast, is_low, moved, peak_flops_per_s, pick_device


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


@pytest.fixture
def gpus(monkeypatch):
    """As if the machine had some. Gives what was said to PyTorch."""
    said = {"current": [], "products": []}
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_device", said["current"].append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said["products"].append)
    return said


def test_a_gpu_named_by_its_number_becomes_the_current_one(gpus):
    for name in ("cuda:1", "cuda", "cpu"):
        assert pick_device(name) == torch.device(name)
    assert gpus["current"] == [torch.device("cuda", 1)]


def test_float32_is_exact_on_cuda_unless_tf32_is_asked_for(gpus, monkeypatch):
    for precision in ("auto", "float32", "bfloat16", "tf32"):
        pick_device("cuda", precision)
    assert gpus["products"] == ["highest"] * 3 + ["high"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == torch.device("cuda") and gpus["products"][-1] == "highest"
    with pytest.raises(ValueError, match=r"precision='tf32' needs a CUDA device, not cpu"):
        pick_device("cpu", "tf32")


def test_products_are_low_on_cuda_or_where_asked():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [is_low(cuda, p) for p in ("auto", "bfloat16", "float32", "tf32")] == [True, True, 0, 0]
    assert [is_low(cpu, p) for p in ("auto", "bfloat16", "float32")] == [False, True, False]
    x = torch.ones(2, 2)
    with autocast(cpu):
        assert (x @ x).dtype == torch.float32
    with autocast(cpu, "bfloat16"):
        assert (x @ x).dtype == torch.bfloat16


def test_the_host_goes_on_while_data_go_to_cuda():
    x = Mock(device=torch.device("cpu"))
    moved(x, torch.device("cuda", 0))
    x.pin_memory.assert_called_once_with()
    x.pin_memory().to.assert_called_once_with(torch.device("cuda", 0), non_blocking=True)
    tokens = torch.arange(3)
    assert moved(tokens, torch.device("cpu")) is tokens
