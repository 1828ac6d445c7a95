"""One step of training: accumulation, waits for the device, and values that are not finite."""

import math

import pytest

from mor import checkpoint
from mor.data.stream import Batch, DataState
from mor.model.config import RouterConfig
from mor.run_folder import RunFolder
from mor.training.config import TrainConfig, load_config, total_flops
from mor.training.distributed import ALONE
from mor.training.loop import train
from mor.training.optim import build_optimizers
from mor.training.step import TrainState, train_step
from tests.conftest import random_tokens, tiny
from tests.training.small_run import (
    BY_GAIN,
    LOSS_FREE,
    WITH_EXITS,
    metrics,
    poisoned,
    quiet,
    settings,
)
from tests.waits import Waits


@pytest.mark.parametrize("router", ["expert_choice", LOSS_FREE])
def test_accumulation_equals_one_large_batch(squares, tmp_path, router):
    one = train(settings(squares, tmp_path / "a", router, steps=4, batch_size=8), console=quiet())
    two = train(
        settings(squares, tmp_path / "b", router, steps=4, batch_size=4, accumulate=2),
        console=quiet(),
    )
    # with the bias that balances
    ours, theirs = (
        two.state.model.state_dict(),
        one.state.model.state_dict(),
    )
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() < 1e-4, name
    assert one.state.flops == two.state.flops


@pytest.mark.parametrize("kv", ["recursion_wise", "shared", "hybrid", "final"])
@pytest.mark.parametrize("router", ["fixed", "expert_choice", "random"])
def test_the_host_waits_once_in_a_step(router, kv):
    """For loss and gradient norm together, however many forwards and recursions there are."""
    if router == "fixed" and kv in ("hybrid", "final"):
        pytest.skip("needs a router")
    model = tiny(RouterConfig(kind=router), kv_strategy=kv)
    config = TrainConfig(model=model.config, accumulate=2, batch_size=2, seq_len=30)
    state = TrainState(model, build_optimizers(model, config.optim), ALONE, model)
    tokens = random_tokens(2, 31)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    with Waits() as waits:
        result = train_step(config, state, iter([(batch, DataState(1))] * 2), 10)
    assert waits.seen == ["tolist"]
    assert result.is_finite and result.grad_norm > 0


def test_exits_are_trained_in_steps_of_full_depth_alone(squares, tmp_path):
    config = settings(squares, tmp_path / "run", BY_GAIN, log_every=1, **WITH_EXITS)
    result = train(config, console=quiet())
    rows = [row for row in metrics(tmp_path / "run") if "mean_depth" in row]
    assert [row["step"] for row in rows if "exits" in row] == [2, 4, 5, 7, 10, 12]
    assert {row["mean_depth"] for row in rows if "exits" in row} == {2.0}
    assert {row["mean_depth"] for row in rows if "exits" not in row} == {1.5}
    kept = load_config(RunFolder(tmp_path / "run").settings)
    assert result.state.flops == pytest.approx(total_flops(kept))


@pytest.mark.parametrize("recursions", [1, 2, 4])
def test_a_step_takes_the_recursions_that_it_draws(recursions):
    """Each further one as the last."""
    model = tiny("fixed", num_recursions=2)
    drawn = dict(recursions_drawn=(recursions, recursions), batch_size=2, seq_len=9)
    config = TrainConfig(model=model.config, **drawn)
    tokens, router = random_tokens(2, 10), model.router
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    state = TrainState(model, build_optimizers(model, config.optim), ALONE, model)
    result = train_step(config, state, iter([(batch, DataState(1))]), 10)
    assert result.mean_depth == recursions
    fresh, deep = tiny("fixed", num_recursions=2), max(2, recursions)
    other = tiny("fixed", num_recursions=deep, num_layers=2 + 2 * deep)
    other.load_state_dict(fresh.state_dict())
    wanted = other(batch.tokens_BT, targets_BT=batch.targets_BT, max_depth=recursions)
    assert result.loss == pytest.approx(wanted.nll.item(), abs=1e-5)
    assert model.router is router


def test_a_step_that_is_not_finite_is_skipped_and_counted(squares, tmp_path, monkeypatch):
    poisoned(monkeypatch, {4, 5, 9})
    console = quiet()
    result = train(settings(squares, tmp_path / "run", log_every=1), console=console)
    assert result.finished and result.state.step == 12 and result.state.skipped == 3
    assert all(p.isfinite().all() for p in result.state.model.parameters())
    assert console.file.getvalue().count("is skipped: its loss is not finite") == 3
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert rows[3]["loss"] is None and rows[5]["loss"] is not None
    assert checkpoint.load_progress(tmp_path / "run")["skipped"] == 3
    assert next(iter(result.state.optimizers[0].state.values()))["step"].item() == 9


def test_a_gradient_that_is_not_finite_is_skipped_although_its_loss_is(
    squares, tmp_path, monkeypatch
):
    import mor.training.step as module

    real, console = module.compute_loss, quiet()

    def loss(output):
        loss.calls += 1
        value = real(output)
        if loss.calls == 3:
            value.register_hook(lambda grad: grad * math.inf)
        return value

    loss.calls = 0
    monkeypatch.setattr(module, "compute_loss", loss)
    result = train(settings(squares, tmp_path / "run", steps=4, log_every=1), console=console)
    assert (
        result.state.skipped == 1
        and "step 3 is skipped: its gradient is not finite" in console.file.getvalue()
    )
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert rows[2]["loss"] is not None and rows[2]["grad_norm"] is None
    assert all(p.isfinite().all() for p in result.state.model.parameters())
