"""One routing decision, what a forward makes of it, and the record of what was decided.

A router looks at the candidates of a recursion and decides, token by token: a :class:`Decision`.
From it follow the tokens that go in, in one of two ways. ``threshold`` takes the router's word,
which looks at the token alone: it is causal. ``topk`` ranks the candidates of each sequence and
keeps as many as the capacity allows; that is what training does, and it sees the future. The
engine, whose tokens are all at different recursions, uses the same decision as a mask.

B rows · T columns · A rows that hold tokens · M packed tokens · C candidates · K those of exits ·
R recursions · D model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mor.model.config import Selection
from mor.model.packing import PackedTokens, take

if TYPE_CHECKING:
    from mor.model.routers import Router

Memory = dict[str, Tensor]
"""What a router remembers of each token from before the first recursion, by name: (M, ...) each.
Only the router that made it looks inside; whoever moves tokens about moves it along."""


@dataclass(frozen=True)
class Decision:
    """What a router says of the candidates of one recursion, each looked at by itself, (C,) each.

    takes: who goes in (None: everyone). gate: weight of the stack's output (None: 1).
    rank: what top-k compares (None: the router has no top-k, and ``takes`` holds in every mode).
    logit: the router's logits (None: it scores nothing). causal_logit: the logits that ``takes``
    follows from: its own, or the auxiliary router's (None: ``takes`` does not follow from a logit).
    """

    takes: Tensor | None = None
    gate: Tensor | None = None
    rank: Tensor | None = None
    logit: Tensor | None = None
    causal_logit: Tensor | None = None


@dataclass(frozen=True)
class RoutingRule:
    """How a forward turns decisions into passes. capacities: one per recursion, relative to the
    full length of a sequence. max_depth: recursions that any token takes at most."""

    selection: Selection
    capacities: Sequence[float]
    max_depth: int


@dataclass(frozen=True)
class RoutingStep:
    """What happened at one recursion (counted from 0). Indices ascend; None means all.

    candidates: the tokens that were decided upon, candidate_index: their places in the packed
    batch, decision: what the router said of them. tokens: those that went in, index: their places
    in the packed batch, kept: among the candidates, gate: weight of the stack's output (None: 1).
    """

    recursion: int
    candidates: PackedTokens
    candidate_index: Tensor | None
    decision: Decision
    tokens: PackedTokens
    index: Tensor | None
    kept: Tensor | None
    gate: Tensor | None

    def gather(self, x: Tensor) -> Tensor:
        """The rows of the tokens that went in, (M, ...) -> (K, ...)."""
        return x if self.index is None else take(x, self.index)

    def scatter(self, new: Tensor, x: Tensor) -> Tensor:
        """``x`` with the rows of those tokens replaced."""
        return new if self.index is None else x.index_copy(0, self.index, new)

    def taken(self, tokens: PackedTokens) -> Tensor:
        """Whether each token of the packed batch went in."""
        if self.index is None:
            return torch.ones_like(tokens.row, dtype=torch.bool)
        return torch.zeros_like(tokens.row, dtype=torch.bool).index_fill_(0, self.index, True)

    @property
    def chosen(self) -> Tensor:
        """Whether each candidate went in."""
        everyone = torch.ones_like(self.candidates.row, dtype=torch.bool)
        if self.kept is None:
            return everyone
        return torch.zeros_like(everyone).index_fill_(0, self.kept, True)


def route(
    router: Router,
    recursion: int,
    x_MD: Tensor,
    tokens: PackedTokens,
    memory: Memory,
    earlier: Sequence[RoutingStep],
    rule: RoutingRule,
) -> RoutingStep:
    """Ask the router about the candidates of a recursion, and keep those that go in."""
    candidate_index, candidates = None, tokens
    if router.is_hierarchical and earlier:  # a token that stayed out stays out
        candidate_index, candidates = earlier[-1].index, earlier[-1].tokens
    if candidate_index is not None:
        x_MD = take(x_MD, candidate_index)
        memory = {name: take(value, candidate_index) for name, value in memory.items()}
    capacity = rule.capacities[recursion]
    decision = router.decide(recursion, x_MD, candidates, memory, capacity)
    gate, index, kept, selected = decision.gate, candidate_index, None, candidates
    if decision.takes is not None:
        if rule.selection == "topk" and decision.rank is not None:
            kept, per_row = top_k(decision.rank.detach(), candidates, tokens, capacity)
        else:
            kept, per_row = decision.takes.nonzero().squeeze(1), None
        selected = candidates.select(kept, per_row)
        index = kept if candidate_index is None else candidate_index[kept]
        gate = None if gate is None else take(gate, kept)
    return RoutingStep(
        recursion, candidates, candidate_index, decision, selected, index, kept, gate
    )


def top_k(
    rank: Tensor, candidates: PackedTokens, tokens: PackedTokens, capacity: float
) -> tuple[Tensor, int | None]:
    """The max(1, int(capacity * length)) candidates of each row that rank best; ties go to the
    earlier token. The length counts all ``tokens`` of the row, not the candidates alone.

    Returns ascending indices and the number per row (None if they differ).
    """
    rank_AC = candidates.pad(rank, fill=float("-inf"))  # padding never competes
    order_AC = rank_AC.argsort(dim=1, descending=True, stable=True)
    if candidates.per_row is not None and tokens.per_row is not None:
        k = min(max(1, int(capacity * tokens.per_row)), candidates.per_row)
        row = torch.arange(candidates.num_rows, device=rank.device)
        start_A1 = row[:, None] * candidates.per_row
        return (order_AC[:, :k].sort(dim=1).values + start_A1).flatten(), k
    quota = (capacity * tokens.count.double()).long().clamp(min=1)
    k_A1 = (quota if candidates.rows is None else quota[candidates.rows])[:, None]
    place_AC = order_AC.argsort(dim=1)
    kept = candidates.unpad(place_AC) < candidates.unpad(k_A1.expand_as(place_AC))
    return kept.nonzero().squeeze(1), None


@dataclass(frozen=True)
class Exits:
    """What some tokens would predict after each recursion that they took: by coda and head on the
    state there, or by another forward in which no token goes further.

    index: their places in the packed batch, (K,). nll_RK: negative log-likelihoods of their
    targets, in nats.
    """

    index: Tensor
    nll_RK: Tensor

    def gain(self, recursion: int) -> Tensor:
        """Nats that going on wins a token before this recursion (counted from 0, not the first):
        up to the best depth from there on; 0 if none is better. (K,), without gradient. For tokens
        that took all."""
        nll_RK = self.nll_RK.detach()
        return (nll_RK[recursion - 1] - nll_RK[recursion:].amin(0)).clamp(min=0)


@dataclass(frozen=True)
class AuxiliaryLoss:
    value: Tensor
    weight: float


@dataclass(frozen=True)
class Routing:
    """The record of one forward: everything that was decided, for losses and for analysis.

    memory: what the router remembered of each token. states: if they were asked for, every token's
    state before the first pass and after each one, (M, D). exits: if they were asked for.
    """

    tokens: PackedTokens
    rule: RoutingRule
    memory: Memory
    steps: Sequence[RoutingStep]
    states: Sequence[Tensor] = ()
    exits: Exits | None = None
    losses: dict[str, AuxiliaryLoss] = field(default_factory=dict)

    @property
    def weighted_loss(self) -> Tensor:
        """Sum of the auxiliary losses, each times its weight."""
        total = torch.zeros((), device=self.tokens.row.device)
        for loss in self.losses.values():
            total = total + loss.weight * loss.value
        return total

    def selected(self, recursion: int) -> Tensor:
        """Whether each packed token took this recursion (counted from 0)."""
        return self.steps[recursion].taken(self.tokens)

    @property
    def taken_RM(self) -> Tensor:
        """Whether each packed token took each recursion."""
        return torch.stack([self.selected(r) for r in range(len(self.steps))])

    @property
    def depth(self) -> Tensor:
        """Recursions that each packed token took."""
        return self.taken_RM.sum(0)

    @property
    def depth_BT(self) -> Tensor:
        """Recursions that each token took; 0 at padding, as for tokens that took none: ``mask_BT``
        tells them apart."""
        return self.tokens.unpack(self.depth)

    @property
    def mask_BT(self) -> Tensor:
        """Where in the batch there are tokens."""
        return self.tokens.unpack(torch.ones_like(self.tokens.row, dtype=torch.bool))

    def depths_by_row(self) -> list[list[int]]:
        """Recursions that the tokens of each sequence took, in order, without padding."""
        return [own.tolist() for own in self.depth.split(self.tokens.count.tolist())]

    def selected_BT(self, recursion: int) -> Tensor:
        """Whether each token took this recursion (counted from 0)."""
        return self.tokens.unpack(self.selected(recursion))

    def logit_BT(self, recursion: int) -> Tensor:
        """Router logits; NaN where the token was not a candidate."""
        step = self.steps[recursion]
        if step.decision.logit is None:
            raise ValueError("this router has no logits: fixed and random routers score nothing")
        logit = self.place(step.candidate_index, step.decision.logit)
        return self.tokens.unpack(logit, float("nan"))

    def gate_BT(self, recursion: int) -> Tensor:
        """Weight of the stack's output; NaN where the token was not selected."""
        step = self.steps[recursion]
        gate = torch.ones(len(step.tokens)) if step.gate is None else step.gate
        return self.tokens.unpack(self.place(step.index, gate), float("nan"))

    def tokens_per_recursion(self) -> list[int]:
        return [len(step.tokens) for step in self.steps]

    def place(self, index: Tensor | None, values: Tensor) -> Tensor:
        """Values of some tokens at their places in the packed batch, NaN elsewhere."""
        device = self.tokens.row.device
        full = torch.full((len(self.tokens),), float("nan"), dtype=values.dtype, device=device)
        full[slice(None) if index is None else index] = values.detach().to(device)
        return full
