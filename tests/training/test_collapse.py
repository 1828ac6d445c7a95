"""What is said of routers that have stopped working, and when."""

import pytest
import torch

from mor.model.config import RouterConfig
from mor.training.collapse import CollapseWatch, collapse_message, shut_gates, shut_message
from mor.training.loop import train
from tests.conftest import tiny
from tests.training.small_run import LOSS_FREE, metrics, quiet, settings

EXPERT = RouterConfig(kind="expert_choice", gate="residual", alpha=1.0)


@pytest.mark.parametrize(
    ("router", "advice"),
    [
        (RouterConfig(kind="expert_choice"), "raise router.selection_weight"),
        (RouterConfig(kind="token_choice"), "raise router.balancing_weight"),
        (LOSS_FREE, "raise router.bias_update_rate"),
        (RouterConfig(kind="token_choice", balancing="none"), "set router.balancing to 'loss'"),
    ],
)
def test_advice_against_a_collapse_is_for_the_router_at_hand(router, advice):
    assert collapse_message([2, 3], router).endswith(f"stays so, {advice}")
    assert collapse_message([], router) is None


@pytest.mark.parametrize("kind", ["fixed", "random", "position", "frequency"])
def test_a_router_that_learns_nothing_cannot_collapse(kind):
    assert collapse_message([2], RouterConfig(kind=kind)) is None


def health(*gates, shares=(1.0, 0.5)):
    return {"share_per_recursion": [*shares], "gate_per_recursion": [*gates]}


def test_a_gate_is_shut_where_tokens_go_in_and_nothing_comes_out():
    assert shut_gates(health(0.009, 0.011), EXPERT) == [1]
    paper = RouterConfig(kind="expert_choice")  # its gates are a tenth
    assert shut_gates(health(0.0009, 0.0011), paper) == [1]
    assert shut_gates(health(0.5, 0.0, shares=(1.0, 0.0)), EXPERT) == [], "nobody goes there"
    assert shut_gates({"share_per_recursion": [1.0, 1.0]}, EXPERT) == [], "it has no gates"
    assert shut_gates({}, EXPERT) == [], "nothing was logged yet"


def test_advice_against_a_shut_gate_names_what_is_not_set_yet():
    assert shut_message([1, 2], EXPERT).endswith(
        "If it stays so, lower optim.lr, or set router.reads='direction'"
    )
    direction = RouterConfig(kind="expert_choice", reads="direction")
    assert shut_message([1], direction).endswith("lower optim.lr")
    assert shut_message([], EXPERT) is None


def test_what_lasts_is_reported_once_and_again_if_it_comes_back():
    watch = CollapseWatch(EXPERT)

    def said(empty, shut, last=False):
        found = watch.messages([1.0, 0.0 if empty else 0.5], health(0.5, 0.5 - shut / 2), last=last)
        return [message.split(":")[0] for message in found]

    nobody, closed = "no validation token takes recursion 2", "the gate of recursion 2 is shut"
    assert said(True, False) == [], "it may be on its way"
    assert said(True, True) == [nobody]
    assert said(True, True) == [closed]
    assert said(True, True) == []
    assert said(False, False) == []
    assert said(True, False) == []
    assert said(True, False) == [nobody], "again"
    assert said(False, True, last=True) == [closed], "nothing comes after the end"


def test_a_run_whose_gates_shut_says_so(squares, tmp_path, monkeypatch):
    import mor.training.loop as module

    real = module.Transformer.init_weights

    def shut(model, seed):
        real(model, seed).router.open = -20.0
        return model

    monkeypatch.setattr(module.Transformer, "init_weights", shut)
    console = quiet()
    train(settings(squares, tmp_path / "run", steps=2, eval_every=1, log_every=1), console=console)
    assert console.file.getvalue().count("the gate of recursion 1, 2 is shut") == 1
    assert max(metrics(tmp_path / "run")[0]["gate_per_recursion"]) < 1e-6


@pytest.mark.parametrize("reads", ["state", "direction"])
def test_the_first_step_of_adamw_moves_a_gate_no_further_than_its_rate_allows(reads):
    router = RouterConfig(kind="expert_choice", gate="residual", alpha=1.0, reads=reads)
    model = tiny(router)
    h = 100 * torch.randn(64, model.config.dim, generator=torch.Generator().manual_seed(0))
    net = model.router.nets[0]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)

    def logit():
        return model.router.decide(0, h, None, {}, 1.0).logit

    before = logit().detach()
    logit().mean().backward()
    optimizer.step()
    moved = float((logit().detach() - before).abs().max())
    allowed = 1e-2 * model.config.dim**0.5
    assert moved <= allowed * (1 + 1e-5) if reads == "direction" else moved > 10 * allowed
