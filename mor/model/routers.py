"""Routers: who takes which recursion, and how a pass's output joins a token's state.

Every router answers three questions. ``start``: what is to be remembered of each token from before
the first recursion? ``decide``: which candidates take this recursion, and with what gate?
``combine``: what becomes of the state of a token that did?

M packed tokens · C candidates · K selected · D model · R recursions · V vocab · B rows of the batch
· T columns
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.model.config import ModelConfig, RouterConfig
from mor.model.packing import PackedTokens, take, tally
from mor.model.random import hash_uniform
from mor.model.routing import AuxiliaryLoss, Decision, Memory, Routing, RoutingStep


def _same(logits: Tensor) -> Tensor:
    return logits


def _add(h: Tensor, out: Tensor, gate: Tensor | float) -> Tensor:
    return h + gate * out


def _move_towards(h: Tensor, out: Tensor, gate: Tensor | float) -> Tensor:
    return h + gate * (out - h)


# Functions with names, so that a model can be pickled.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "none": _same,
    "softmax": partial(torch.softmax, dim=-1),
}

# How the gated output of the stack joins the state it started from.
GATES: dict[str, Callable[[Tensor, Tensor, Tensor | float], Tensor]] = {
    "paper": _add,
    "residual": _move_towards,
}


GAIN_THRESHOLD = 0.1
"""Nats that a recursion must promise, before a budget says otherwise."""
OPEN = 2.0
"""Added to the logit of a gate that nothing else holds open: without it some runs learn gates near
a half and lose what recursions give (LOG.md)."""


class Processes(Protocol):
    """The processes of a training run, as routers see them; each gives a tensor of one shape."""

    def mean(self, x: Tensor) -> Tensor: ...

    def sum(self, x: Tensor) -> Tensor: ...

    def max(self, x: Tensor) -> Tensor: ...


class _SingleProcess:
    def mean(self, x: Tensor) -> Tensor:
        return x

    sum = max = mean


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def router_logits(net: nn.Module, x_MD: Tensor, reads: str = "state") -> Tensor:
    """``net(x)``, or of x at length one, in the precision of its weights, also under autocast: bf16
    has too few digits to rank tokens by."""
    with torch.autocast(x_MD.device.type, enabled=False):
        x_MD = x_MD.to(next(net.parameters()).dtype)
        if reads == "direction":
            x_MD = F.normalize(x_MD, dim=-1)
        return at_least_fp32(net(x_MD))


def score_net(architecture: str, dim: int, outputs: int) -> nn.Module:
    """The router's network: linear, or one hidden layer of width dim or 4 * dim."""
    if architecture == "linear":
        return nn.Linear(dim, outputs, bias=False)
    hidden = dim if architecture == "mlp" else 4 * dim
    into, out = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, outputs, bias=False)
    return nn.Sequential(into, nn.GELU(), out)


def evenly_by_position(tokens: PackedTokens) -> Tensor:
    """A number in [0, 1) for each token: multiples of the golden ratio fill it evenly."""
    return (tokens.position.double() * ((5**0.5 - 1) / 2)) % 1


class Router(nn.Module):
    """Base of all routers: every token takes every recursion, and the stack's output replaces its
    state.

    processes: those of a training run, over which loads are averaged.
    """

    is_hierarchical = False
    """Only tokens that took a recursion are candidates for the next."""
    one_scale = False
    """Urges of all recursions are on one scale, so that one threshold serves them all."""
    has_topk = False
    """Training selects in a way that sees the future."""
    is_learned = False
    """Scores tokens with weights that training fits."""
    needs_token_counts = False
    """:meth:`fit` has to be called before training."""
    learns_from_exits = False
    """Its losses need a record with exits."""
    balances_between_steps = False
    """:meth:`after_step` has to be called after every optimizer step."""
    processes: Processes = _SingleProcess()

    def __init__(self, config: RouterConfig, dim: int, num_recursions: int) -> None:
        super().__init__()
        self.config, self.num_recursions = config, num_recursions

    @classmethod
    def of(cls, config: ModelConfig) -> Router:
        """The router of a model."""
        return cls(config.router, config.dim, config.num_recursions)

    @property
    def may_return(self) -> bool:
        """Whether a token that stayed out of a recursion may take a later one."""
        return False

    def start(self, x_MD: Tensor, tokens: PackedTokens, max_depth: int) -> Memory:
        """What to remember of each token. x: states before the first recursion. max_depth:
        recursions that a token takes at most."""
        return {}

    def decide(
        self, recursion: int, h_CD: Tensor, tokens: PackedTokens, memory: Memory, capacity: float
    ) -> Decision:
        """Which of these candidates take a recursion (counted from 0).

        h: their states. tokens and memory: the candidates', too. capacity: the share of all tokens
        that the recursion is meant for.
        """
        return Decision()

    def combine(
        self,
        recursion: int | Tensor,
        h_KD: Tensor,
        out_KD: Tensor,
        gate: Tensor | None,
        memory: Memory,
    ) -> Tensor:
        """New states of tokens that took a recursion. h: before the pass; out: the stack's output.

        recursion: one number, or (K,) where tokens at different recursions share a pass.
        """
        return out_KD

    def urge(
        self,
        recursion: int,
        decision: Decision | None,
        tokens: PackedTokens | None,
        memory: Memory,
    ) -> Tensor:
        """How much each candidate wants a recursion, (C,), on a scale of the recursion's own: what
        a depth budget compares with its threshold (budget.py). Routers that learn nothing spread
        evenly over [0, 1); this one by position, as :class:`PositionRouter`.

        decision: what :meth:`decide` said. Both it and tokens are None where depths are chosen
        before the first recursion.
        """
        assert tokens is not None
        return evenly_by_position(tokens)

    def chosen_depth(self, memory: Memory) -> Tensor | None:
        """Depths that tokens chose before the first recursion, (M,), counted from 1; None where
        each recursion decides."""
        return None

    def with_depth(self, memory: Memory, depth: Tensor) -> Memory:
        """The memory as if tokens had chosen these depths."""
        return memory

    def losses(self, routing: Routing) -> dict[str, AuxiliaryLoss]:
        """Auxiliary losses of a forward, by name."""
        return {}

    def threshold(self, recursion: int) -> float | None:
        """The score above which a token takes a recursion; None if there is no such number."""
        return None

    def shown_score(self, routing: Routing, recursion: int) -> Tensor | None:
        """Scores to show, between 0 and 1; NaN for tokens that were not candidates. None: the
        router scores nothing."""
        return None

    @torch.no_grad()
    def health(
        self, routings: Sequence[Routing], processes: Processes | None = None
    ) -> dict[str, Any]:
        """What shows whether routing works, over the forwards of one step on all processes, which
        have the same number of recursions.

        mean_depth; share_per_recursion: of all tokens; depth_entropy: of the depths that tokens
        took, 1 if all that the capacities allow are equally frequent; dead_positions: share of
        columns in which no row reached the last recursion; gate_per_recursion: mean size of the
        gates of the tokens that went in, if there are gates.
        """
        processes, R = processes or self.processes, len(routings[0].steps)
        taken = torch.stack([r.taken_RM.sum(1) for r in routings]).sum(0)
        depths_R1 = tally(torch.cat([r.depth for r in routings]), R + 1)
        counts = processes.sum(torch.cat([taken, depths_R1])).double()
        taken, depths_R1 = counts[:R], counts[R:]
        tokens = depths_R1.sum()
        found: dict[str, Any] = {
            "mean_depth": float(taken.sum() / tokens),
            "share_per_recursion": (taken / tokens).tolist(),
        }
        gates = [step.gate for routing in routings for step in routing.steps]
        sizes = [gate.abs().sum() for gate in gates if gate is not None]
        if len(sizes) == len(gates):
            total = processes.sum(torch.stack(sizes).view(-1, R).sum(0))
            found["gate_per_recursion"] = (total / taken.clamp(min=1)).tolist()
        return found | self._routing_health(routings, depths_R1, processes)

    def _routing_health(
        self, routings: Sequence[Routing], depths_R1: Tensor, processes: Processes
    ) -> dict[str, Any]:
        share = depths_R1 / depths_R1.sum()
        last = len(routings[0].steps) - 1
        depths = last + 1 + any(routing.rule.capacities[0] < 1 for routing in routings)
        reached = torch.stack([r.selected_BT(last).any(0) for r in routings]).any(0)
        return {
            "depth_entropy": float(torch.special.entr(share).sum()) / math.log(max(2, depths)),
            "dead_positions": 1 - float(processes.max(reached.float()).mean()),
        }

    def after_step(self, routings: Sequence[Routing]) -> None:
        """Called after an optimizer step with the forwards that led to it."""

    def fit(self, count: Tensor) -> None:
        """Called before training with the occurrences of each token in the training text."""

    def resize_vocabulary(self, vocab_size: int) -> None:
        """Called when the embedding has got more or fewer tokens."""


class FixedDepthRouter(Router):
    """The Recursive Transformer, and with one recursion the vanilla one."""

    def _routing_health(self, *_: Any) -> dict[str, Any]:
        return {}


class ExpertChoiceRouter(Router):
    """Each recursion picks its tokens (arXiv 2507.10524, expert-choice routing).

    Training selects with ``topk``, which compares a token with later ones. ``threshold`` looks at
    the token alone: its logit (the router's own or the second network's) against ``threshold_R``.

    With ``gain`` the second network's score is the gain that it expects of going on, in nats up to
    1; top-k compares it, too, and the router's own score is the gate and nothing else.
    """

    has_topk = is_learned = True
    threshold_R: Tensor

    def __init__(self, config: RouterConfig, dim: int, num_recursions: int) -> None:
        super().__init__(config, dim, num_recursions)
        self.is_hierarchical = config.hierarchical
        self.score, self.gate = SCORES[config.score_name], GATES[config.gate]
        auxiliary = 0 if config.causal_selection == "aux_loss" else num_recursions
        self.nets, self.aux_nets = (
            nn.ModuleList(score_net(config.architecture, dim, 1) for _ in range(count))
            for count in (num_recursions, auxiliary)
        )
        learns_gains = config.causal_selection == "gain"
        self.learns_from_exits = self.predicts_gain = self.one_scale = learns_gains
        self.open = OPEN if self.predicts_gain else 0.0
        threshold = GAIN_THRESHOLD if self.predicts_gain else 0.5
        self.register_buffer("threshold_R", torch.full((num_recursions,), threshold))

    @property
    def may_return(self) -> bool:
        return not self.is_hierarchical

    def decide(
        self, recursion: int, h_CD: Tensor, tokens: PackedTokens, memory: Memory, capacity: float
    ) -> Decision:
        reads = self.config.reads
        logit = causal = router_logits(self.nets[recursion], h_CD, reads).squeeze(-1)
        if self.aux_nets:
            # What imitates top-k learns from its own loss alone: no gradient goes into the states.
            seen_CD = h_CD if self.predicts_gain else h_CD.detach()
            causal = router_logits(self.aux_nets[recursion], seen_CD, reads).squeeze(-1)
        takes = None if capacity == 1 else causal.sigmoid() > self.threshold_R[recursion]
        gate = self.config.gate_scale * self.score(logit + self.open)
        # The logit ranks as the score does, and does not saturate.
        rank = causal if self.predicts_gain else logit
        return Decision(takes, gate, rank, logit, causal)

    def urge(
        self,
        recursion: int,
        decision: Decision | None,
        tokens: PackedTokens | None,
        memory: Memory,
    ) -> Tensor:
        """The logit that the threshold looks at: unlike its sigmoid it does not saturate."""
        assert decision is not None and decision.causal_logit is not None
        return decision.causal_logit

    def combine(
        self,
        recursion: int | Tensor,
        h_KD: Tensor,
        out_KD: Tensor,
        gate: Tensor | None,
        memory: Memory,
    ) -> Tensor:
        assert gate is not None
        return self.gate(h_KD, out_KD, gate[:, None].to(out_KD.dtype))

    def losses(self, routing: Routing) -> dict[str, AuxiliaryLoss]:
        """Binary cross-entropy of the causal logits against membership in the top-k, which teaches
        the threshold to decide the same, or against the gain that exits show; and the z-loss."""
        if routing.rule.selection != "topk":
            return {}
        zero = torch.zeros((), device=routing.tokens.row.device)
        if self.predicts_gain:
            found = {"gain": AuxiliaryLoss(self._gain_loss(routing), self.config.gain_weight)}
        else:
            selection = sum((self._selection_loss(step) for step in routing.steps), zero)
            found = {"selection": AuxiliaryLoss(selection, self.config.selection_weight)}
        if self.config.z_loss_weight:
            logits = [step.decision.logit for step in routing.steps]
            squares = [logit.square().mean() for logit in logits if logit is not None]
            found["z_loss"] = AuxiliaryLoss(sum(squares, zero), self.config.z_loss_weight)
        return found

    def _selection_loss(self, step: RoutingStep) -> Tensor:
        causal = step.decision.causal_logit
        assert causal is not None
        return F.binary_cross_entropy_with_logits(causal, step.chosen.to(causal.dtype))

    def _gain_loss(self, routing: Routing) -> Tensor:
        """Mean over the recursions from the second on; 0 without exits, whose tokens take all."""
        total = torch.zeros((), device=routing.tokens.row.device)
        if routing.exits is None:
            return total
        for step in routing.steps[1:]:
            assert step.decision.causal_logit is not None and step.candidate_index is None
            expected = take(step.decision.causal_logit, routing.exits.index)
            gain = routing.exits.gain(step.recursion).clamp(max=1).to(expected.dtype)
            total = total + F.binary_cross_entropy_with_logits(expected, gain)
        return total / max(1, len(routing.steps) - 1)

    def threshold(self, recursion: int) -> float | None:
        return float(self.threshold_R[recursion])

    def shown_score(self, routing: Routing, recursion: int) -> Tensor | None:
        """Sigmoid of the logit that the threshold looks at."""
        step = routing.steps[recursion]
        assert step.decision.causal_logit is not None
        return routing.place(step.candidate_index, step.decision.causal_logit.sigmoid())

    def _routing_health(
        self, routings: Sequence[Routing], depths_R1: Tensor, processes: Processes
    ) -> dict[str, Any]:
        """Also agreement: share of decisions that the threshold would have taken as top-k did."""
        found = super()._routing_health(routings, depths_R1, processes)
        same, count = depths_R1.new_zeros(()), 0
        for step in (step for routing in routings for step in routing.steps):
            if step.decision.takes is not None:
                same = same + (step.chosen == step.decision.takes).sum()
                count += len(step.candidates)
        all_same, all_count = processes.sum(torch.stack([same, same.new_tensor(count)])).tolist()
        return found | {"agreement": all_same / all_count if all_count else None}


class TokenChoiceRouter(Router):
    """Each token picks its depth once, before the first recursion (token-choice of the paper)."""

    is_learned = True
    bias_R: Tensor

    def __init__(self, config: RouterConfig, dim: int, num_recursions: int) -> None:
        super().__init__(config, dim, num_recursions)
        self.score, self.gate = SCORES[config.score_name], GATES[config.gate]
        self.net = score_net(config.architecture, dim, num_recursions)
        self.register_buffer("bias_R", torch.zeros(num_recursions))
        self.balances_between_steps = config.balancing == "loss_free"
        forms = {"last": self._gate_last, "every": self._gate_every}
        self.combine_form = forms[config.combination]

    def start(self, x_MD: Tensor, tokens: PackedTokens, max_depth: int) -> Memory:
        logit_MR = router_logits(self.net, x_MD, self.config.reads)
        score_MR = self.score(logit_MR)
        wish = (score_MR + self.bias_R).argmax(-1) + 1  # the bias balances, it does not gate
        depth = wish.clamp(max=max_depth)
        return dict(logit=logit_MR, score=score_MR, wish=wish, depth=depth, first=x_MD)

    def decide(
        self, recursion: int, h_CD: Tensor, tokens: PackedTokens, memory: Memory, capacity: float
    ) -> Decision:
        takes = None if recursion == 0 else memory["depth"] > recursion  # all take at least one
        gate = self.config.gate_scale * memory["score"][:, recursion]
        return Decision(takes, gate, logit=memory["logit"][:, recursion])

    def combine(
        self,
        recursion: int | Tensor,
        h_KD: Tensor,
        out_KD: Tensor,
        gate: Tensor | None,
        memory: Memory,
    ) -> Tensor:
        assert gate is not None
        last_K1 = (memory["depth"] == recursion + 1)[:, None]
        gate_K1 = gate[:, None].to(out_KD.dtype)
        return self.combine_form(out_KD, memory["first"], gate_K1, last_K1)

    def _gate_last(
        self, out_KD: Tensor, first_KD: Tensor, gate_K1: Tensor, last_K1: Tensor
    ) -> Tensor:
        return torch.where(last_K1, self.gate(first_KD, out_KD, gate_K1), out_KD)

    def _gate_every(
        self, out_KD: Tensor, first_KD: Tensor, gate_K1: Tensor, last_K1: Tensor
    ) -> Tensor:
        return gate_K1 * out_KD + last_K1 * first_KD

    def urge(
        self,
        recursion: int,
        decision: Decision | None,
        tokens: PackedTokens | None,
        memory: Memory,
    ) -> Tensor:
        """How far the best logit of a depth that takes the recursion lies above the best of one
        that does not. It falls with depth, so a token that refuses a recursion refuses those that
        follow."""
        logit_MR = memory["logit"]
        return logit_MR[:, recursion:].amax(1) - logit_MR[:, :recursion].amax(1)

    def chosen_depth(self, memory: Memory) -> Tensor | None:
        return memory["depth"]

    def with_depth(self, memory: Memory, depth: Tensor) -> Memory:
        return memory | {"depth": depth}

    def losses(self, routing: Routing) -> dict[str, AuxiliaryLoss]:
        """The balancing loss, 1 if all depths are equally frequent; and the z-loss."""
        found, score_MR = {}, routing.memory["score"]
        if self.config.balancing == "loss":
            wish = routing.memory["wish"]
            share = tally(wish - 1, self.num_recursions) / wish.numel()
            share = self.processes.mean(share)
            mean = (score_MR / score_MR.sum(-1, keepdim=True)).mean(0)
            balance = self.num_recursions * (share * mean).sum()
            found["balancing"] = AuxiliaryLoss(balance, self.config.balancing_weight)
        if self.config.z_loss_weight:
            z_loss = routing.memory["logit"].logsumexp(-1).square().mean()
            found["z_loss"] = AuxiliaryLoss(z_loss, self.config.z_loss_weight)
        return found

    def shown_score(self, routing: Routing, recursion: int) -> Tensor | None:
        """The depth's share of all depths' scores."""
        score_MR = routing.memory["score"]
        trained = min(recursion, self.num_recursions - 1)
        return score_MR[:, trained] / score_MR.sum(-1)

    def _routing_health(
        self, routings: Sequence[Routing], depths_R1: Tensor, processes: Processes
    ) -> dict[str, Any]:
        """Also max_violation: how far the most chosen depth lies above the mean load."""
        found = super()._routing_health(routings, depths_R1, processes)
        share = depths_R1[1:] / depths_R1.sum()
        return found | {"max_violation": float(share.max()) * self.num_recursions - 1}

    def after_step(self, routings: Sequence[Routing]) -> None:
        if self.balances_between_steps:
            depth = torch.cat([routing.memory["depth"] for routing in routings])
            self.update_bias(tally(depth - 1, self.num_recursions))

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Loss-free balancing. load: tokens that chose each depth since the last step."""
        load = self.processes.mean(load.to(self.bias_R))
        self.bias_R += self.config.bias_update_rate * torch.sign(load.mean() - load)


class GainRouter(ExpertChoiceRouter):
    """A token goes on where that is predicted to lower its loss enough.

    What is enough, training measures: the largest gains that together make 99% of all gain are
    worth a recursion (the rule of Think-at-Hard 2, arXiv 2609.35748). The same threshold decides in
    training and in use, and the score is a prediction and no gate: the output replaces the state.
    """

    has_topk = False

    def __init__(self, config: RouterConfig, dim: int, num_recursions: int) -> None:
        super().__init__(config, dim, num_recursions)
        self.is_hierarchical = self.learns_from_exits = True
        self.nets, self.aux_nets = (
            nn.ModuleList(score_net(config.architecture, 2 * dim, 1) for _ in range(count))
            for count in (num_recursions - 1, 0)
        )

    def start(self, x_MD: Tensor, tokens: PackedTokens, max_depth: int) -> Memory:
        return {"entered": x_MD}

    def decide(
        self, recursion: int, h_CD: Tensor, tokens: PackedTokens, memory: Memory, capacity: float
    ) -> Decision:
        if recursion == 0:
            return Decision()
        both = (F.rms_norm(x, x.shape[-1:]) for x in (h_CD, memory["entered"]))
        seen_CD = torch.cat([*both], dim=-1).detach()  # the router learns from gains alone
        logit = router_logits(self.nets[recursion - 1], seen_CD).squeeze(-1)
        takes = logit.sigmoid() > self.threshold_R[recursion]
        return Decision(takes, logit=logit, causal_logit=logit)

    def combine(
        self,
        recursion: int | Tensor,
        h_KD: Tensor,
        out_KD: Tensor,
        gate: Tensor | None,
        memory: Memory,
    ) -> Tensor:
        return out_KD

    def losses(self, routing: Routing) -> dict[str, AuxiliaryLoss]:
        """Of the predictions for tokens that took a recursion, against what it gained them; without
        exits none, and no loss."""
        if routing.exits is None:
            return {}
        index, nll_RK = routing.exits.index, routing.exits.nll_RK.detach()
        total = torch.zeros((), device=nll_RK.device)
        for step in routing.steps[1:]:
            assert step.decision.logit is not None
            logit = step.decision.logit
            if step.candidate_index is not None:
                zeros = logit.new_zeros(len(routing.tokens))
                logit = zeros.index_copy(0, step.candidate_index, logit)
            took = step.taken(routing.tokens)[index]
            gain = nll_RK[step.recursion - 1] - nll_RK[step.recursion]
            total = total + _worth_loss(take(logit, index)[took], gain[took])
        return {"gain": AuxiliaryLoss(total, self.config.gain_weight)}

    def shown_score(self, routing: Routing, recursion: int) -> Tensor | None:
        """The predicted probability that a recursion is worth it; 1 for the first."""
        if recursion == 0:
            return torch.ones(len(routing.tokens), device=routing.tokens.row.device)
        return super().shown_score(routing, recursion)


LEAST_GAIN = 1e-3
"""Nats. What is below may be rounding: the gain of recursions that change nothing yet."""


def _worth_loss(logit: Tensor, gain: Tensor, share: float = 0.99) -> Tensor:
    """Binary cross-entropy against whether a gain is among the largest that make this share of all
    gain. Gains near the cutoff count little, both answers count the same. 0 where nothing gains."""
    positive = gain[gain > LEAST_GAIN].sort(descending=True).values
    if not len(positive):
        return logit.sum() * 0
    enough = int((positive.cumsum(0) < share * positive.sum()).sum())
    cutoff = positive[min(enough, len(positive) - 1)]
    worth = (gain >= cutoff).to(logit.dtype)
    weight = (gain - cutoff).abs().clamp(1e-6, 1).to(logit.dtype)
    sums = (weight * worth).sum(), (weight * (1 - worth)).sum()
    if min(sums) > 0:
        weight = weight * torch.where(worth > 0, sums[1], sums[0])
    loss = F.binary_cross_entropy_with_logits(logit, worth, weight, reduction="sum")
    return loss / weight.sum()


class RandomRouter(Router):
    """The control: depth is drawn from (seed, token, position), causal and reproducible."""

    has_topk = True

    def __init__(self, config: RouterConfig, dim: int, num_recursions: int) -> None:
        super().__init__(config, dim, num_recursions)
        self.gate = GATES[config.gate]

    def need(self, tokens: PackedTokens) -> Tensor:
        """Who goes first, (M,), evenly spread over [0, 1): a recursion of capacity c takes those
        from 1 - c on."""
        return hash_uniform(self.config.seed, tokens.ids, tokens.position)

    def urge(
        self,
        recursion: int,
        decision: Decision | None,
        tokens: PackedTokens | None,
        memory: Memory,
    ) -> Tensor:
        if decision is not None and decision.rank is not None:
            return decision.rank
        assert tokens is not None
        return self.need(tokens)

    def decide(
        self, recursion: int, h_CD: Tensor, tokens: PackedTokens, memory: Memory, capacity: float
    ) -> Decision:
        if capacity == 1:
            return Decision()
        need = self.need(tokens)
        return Decision(takes=need >= 1 - capacity, rank=need)

    def combine(
        self,
        recursion: int | Tensor,
        h_KD: Tensor,
        out_KD: Tensor,
        gate: Tensor | None,
        memory: Memory,
    ) -> Tensor:
        return self.gate(h_KD, out_KD, self.config.gate_scale)


class PositionRouter(RandomRouter):
    """A baseline: depth follows from the position alone, spread as evenly as possible."""

    def need(self, tokens: PackedTokens) -> Tensor:
        return evenly_by_position(tokens)


class FrequencyRouter(RandomRouter):
    """A baseline: the rarer a token, the deeper it goes. Knows only how often each token occurs."""

    needs_token_counts = True
    need_V: Tensor

    def __init__(
        self, config: RouterConfig, dim: int, num_recursions: int, vocab_size: int
    ) -> None:
        super().__init__(config, dim, num_recursions)
        self.register_buffer("need_V", torch.zeros(vocab_size))
        self.fit(torch.ones(vocab_size))

    @classmethod
    def of(cls, config: ModelConfig) -> Router:
        return cls(config.router, config.dim, config.num_recursions, config.vocab_size)

    @torch.no_grad()
    def fit(self, count: Tensor) -> None:
        """A token's need becomes the share of the text that more frequent tokens make up."""
        order = count.argsort(descending=True, stable=True)
        ordered = count[order].double()
        middle = (ordered.cumsum(0) - ordered / 2) / ordered.sum().clamp(min=1)
        self.need_V[order] = middle.to(self.need_V)

    def resize_vocabulary(self, vocab_size: int) -> None:
        """New tokens were never seen: none is rarer."""
        self.need_V = F.pad(self.need_V, (0, vocab_size - len(self.need_V)), value=1.0)

    def need(self, tokens: PackedTokens) -> Tensor:
        return self.need_V[tokens.ids]


ROUTERS: dict[str, type[Router]] = {
    "fixed": FixedDepthRouter,
    "expert_choice": ExpertChoiceRouter,
    "token_choice": TokenChoiceRouter,
    "gain": GainRouter,
    "random": RandomRouter,
    "position": PositionRouter,
    "frequency": FrequencyRouter,
}


def build_router(config: ModelConfig) -> Router:
    return ROUTERS[config.router.kind].of(config)
