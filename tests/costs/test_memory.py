"""The estimate of training memory is what a step on a CPU really allocates."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mor.costs import memory
from mor.costs.memory import Step, train_memory
from mor.model import loss
from mor.model.config import preset
from mor.model.transformer import Transformer
from mor.training.optim import OptimConfig, build_optimizers

SHAPE = dict(num_layers=8, vocab_size=2048, max_seq_len=256)


def model_config(name):
    expert = dict(recipe="paper")
    return preset(
        "mini",
        **SHAPE,
        **{
            "vanilla": {},
            "recursive": dict(num_recursions=3, router="fixed"),
            "mor-2": dict(num_recursions=2, **expert),
            "mor-3": dict(num_recursions=3, **expert),
            "shared": dict(num_recursions=3, kv_strategy="shared", **expert),
        }[name],
    )


def measured_peak(config, batch_size, recompute):
    model = Transformer(config).init_weights(0)
    optimizers = build_optimizers(model, OptimConfig())
    tokens = torch.randint(
        config.vocab_size, (batch_size, 257), generator=torch.Generator().manual_seed(0)
    )

    def step():
        output = model(
            tokens[:, :-1], targets_BT=tokens[:, 1:], selection="topk", recompute=recompute
        )
        (output.nll + output.routing.weighted_loss).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    step()  # makes the moments
    return allocated_peak(step) + 3 * sum(p.nbytes for p in model.parameters())


def allocated_peak(step):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        *((name, False) for name in ("vanilla", "recursive", "mor-3", "shared")),
        ("mor-3", True),
        pytest.param("mor-2", False, marks=pytest.mark.slow),
        *(
            pytest.param(name, True, marks=pytest.mark.slow)
            for name in ("vanilla", "recursive", "mor-2", "shared")
        ),
    ],
)
def test_the_estimate_meets_a_measured_step(name, recompute):
    config = model_config(name)
    run = Step(
        batch_size=2, seq_len=256, precision="float32", recompute=recompute, fused_norms=False
    )
    found = train_memory(config, run).peak / measured_peak(config, 2, recompute)
    assert found == pytest.approx(1, abs=0.12 if recompute else 0.03)


def test_the_head_holds_one_chunk_of_logits_and_one_copy_however_many_there_are(monkeypatch):
    for module in (loss, memory):
        monkeypatch.setattr(module, "CHUNK_LOGITS", 1 << 20)
    config = preset("tiny", vocab_size=4096)
    x = torch.randn(4096, config.dim, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.dim, requires_grad=True)
    target = torch.arange(4096)
    peak = allocated_peak(lambda: loss.linear_cross_entropy(x, weight, target).backward())
    assert peak == pytest.approx(memory.head_bytes(config, 4096), rel=0.03)


def test_routing_and_ranks_by_hand():
    config, vanilla = (
        preset("smollm-360m", num_recursions=n, router=r)
        for n, r in [(2, "expert_choice"), (1, "fixed")]
    )
    step = Step(batch_size=16, seq_len=2048)
    assert train_memory(config, step).activations < 0.8 * train_memory(vanilla, step).activations
    with torch.device("meta"):
        params = 4 * sum(p.numel() for p in Transformer(config).parameters())
    ddp, fsdp = (
        train_memory(config, Step(batch_size=1, seq_len=64, ranks=8, parallel=p))
        for p in ("ddp", "fsdp")
    )
    assert (ddp.weights, ddp.moments) == (params, 2 * params)
    assert (fsdp.weights, fsdp.moments) == (params // 8 + params, 2 * params // 8), (
        "its share, and during a step all"
    )
    assert train_memory(config, Step(batch_size=1, seq_len=64, ranks=1)).peak < ddp.peak, (
        "buckets of gradients"
    )
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        Step(batch_size=1, seq_len=64, ranks=0)
    with pytest.raises(ValueError, match="parallel must be 'ddp' or 'fsdp', got 'fdsp'"):
        Step(batch_size=1, seq_len=64, parallel="fdsp")
