"""Compiled layers: one graph each side of attention, for any number of tokens, same values; waits
for the device."""

import pytest
import torch
from conftest import random_tokens, tiny
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from mor import device
from mor.model.config import RouterConfig

WARM_UP = [(1.0, 1.0, 1.0), (1.0, 0.9, 0.8), (1.0, 0.8, 0.6), (1.0, 2 / 3, 1 / 3)]


def gradients(model, tokens, capacities):
    model.zero_grad()
    output = model(tokens, targets_BT=tokens, selection="topk", capacities=capacities)
    (output.nll + output.routing.weighted_loss).backward()
    return [output.nll.detach()] + [
        p.grad.clone() for p in model.parameters() if p.grad is not None
    ]


@pytest.mark.parametrize("kv", ["recursion_wise", "shared"])
@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_no_graph_breaks_and_no_recompiling_in_the_capacity_warm_up(router, kv):
    """Graph breaks are errors (fullgraph); every graph compiled is counted."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model, plain = tiny(router, kv_strategy=kv), tiny(router, kv_strategy=kv)
    model.compile_blocks(backend=backend)
    counts = []
    for step, capacities in enumerate(WARM_UP if router == "expert_choice" else [None] * 4):
        tokens = random_tokens(2, 30, seed=step)
        found, expected = gradients(model, tokens, capacities), gradients(plain, tokens, capacities)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        counts.append(len(compiled))
    # also without keys; also after attention over ragged rows
    parts = 2 + (kv == "shared") + (router == "token_choice")
    assert counts == [parts] * 4, (
        "once each, in the first step, for all layers, recursions and capacities"
    )
    gradients(model, random_tokens(3, 41), None)
    assert len(compiled) == parts, "nor for another batch size or length"


class Waits(TorchFunctionMode):
    """Operations whose result the host must have before it goes on."""

    NAMES = frozenset(
        [
            "tolist",
            "item",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "nonzero",
            "bincount",
            "cpu",
        ]
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.NAMES:
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("router", "kv", "expected"),
    [
        ("fixed", "recursion_wise", []),
        ("expert_choice", "recursion_wise", []),
        ("expert_choice", "shared", []),
        ("random", "recursion_wise", []),
        ("token_choice", "recursion_wise", ["nonzero", "tolist"]),
        ("token_choice", "shared", ["nonzero", "tolist"]),
    ],
)
def test_how_often_a_training_forward_waits_for_the_device(router, kv, expected):
    """Token-choice needs two shapes for each recursion after the first: how many tokens, and how
    many in each row."""
    model = tiny(RouterConfig(kind=router), kv_strategy=kv)
    tokens = random_tokens(2, 30)
    with Waits() as waits:
        model(tokens, targets_BT=tokens, selection="topk")
    assert waits.seen == expected * 2


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


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["recursion_wise", "shared"])
@pytest.mark.parametrize("router", ["fixed", "expert_choice", "token_choice"])
def test_compiled_bf16_training_on_a_gpu_stays_close_to_fp32_on_the_cpu(router, kv):
    plain = tiny(router, kv_strategy=kv, head_dim=16, dim=64)
    model = tiny(router, kv_strategy=kv, head_dim=16, dim=64).cuda().compile_blocks()
    tokens = random_tokens(2, 48)
    expected = plain(tokens, targets_BT=tokens, selection="topk").nll
    with device.preferred_kernels(torch.device("cuda")), torch.autocast("cuda", torch.bfloat16):
        output = model(tokens.cuda(), targets_BT=tokens.cuda(), selection="topk")
    assert output.nll.dtype == torch.float32
    torch.testing.assert_close(output.nll.cpu(), expected, atol=0.05, rtol=0.05)
    output.nll.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
