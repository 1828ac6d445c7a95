"""Routers: which tokens take which recursion, and how a pass's output joins a token's state.

Every router answers the same two questions for every recursion: ``select`` (which tokens go in) and
``combine`` (what becomes of them). A forward collects the answers in a :class:`Routing` record.

B rows · T columns · M packed tokens · C candidates · K selected · D model · R recursions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor.model.config import ModelConfig, RouterConfig, Selection
from mor.model.packing import PackedTokens, take, tally
from mor.model.random import hash_uniform


@dataclass(frozen=True)
class RoutingStep:
    """What the router decided at one recursion. Indices point into the packed batch; None means
    all.

    recursion: counted from 0; in an engine, which mixes depths, a tensor with one for each token.
    tokens: the selected tokens. index_K: their indices. gate_K: weight of the stack's output (None:
    1).
    candidate_C: tokens that were scored. logit_C: their router logits. causal_logit_C: the logits
    that threshold selection looks at (the router's own, or the auxiliary router's).
    """

    recursion: int
    tokens: PackedTokens
    index_K: Tensor | None = None
    gate_K: Tensor | None = None
    candidate_C: Tensor | None = None
    logit_C: Tensor | None = None
    causal_logit_C: Tensor | None = None


@dataclass(frozen=True)
class AuxiliaryLoss:
    value: Tensor
    weight: float


@dataclass
class Routing:
    """Record of one forward: everything the routers decided, for losses and for analysis."""

    tokens: PackedTokens
    selection: Selection
    capacities: Sequence[float]
    max_depth: int
    steps: list[RoutingStep] = field(default_factory=list)
    losses: dict[str, AuxiliaryLoss] = field(default_factory=dict)
    choice_M: Tensor | None = None
    """Depth chosen before the first recursion, 1..R (token-choice)."""
    logit_MR: Tensor | None = None
    score_MR: Tensor | None = None
    """Logit and score of every depth (token-choice)."""

    def add_loss(self, name: str, value: Tensor, weight: float) -> None:
        before = self.losses[name].value if name in self.losses else 0.0
        self.losses[name] = AuxiliaryLoss(before + value, weight)

    @property
    def weighted_loss(self) -> Tensor:
        """Sum of the auxiliary losses, each times its weight."""
        total = torch.zeros((), device=self.tokens.row_M.device)
        for loss in self.losses.values():
            total = total + loss.weight * loss.value
        return total

    def selected_M(self, recursion: int) -> Tensor:
        """Whether each packed token took this recursion (counted from 0)."""
        index_K, device = self.steps[recursion].index_K, self.tokens.row_M.device
        if index_K is None:
            return torch.ones(len(self.tokens), dtype=torch.bool, device=device)
        return torch.zeros(len(self.tokens), dtype=torch.bool, device=device).index_fill_(
            0, index_K, True
        )

    @property
    def depth_M(self) -> Tensor:
        """Recursions that each packed token took."""
        return torch.stack([self.selected_M(r) for r in range(len(self.steps))]).sum(0)

    @property
    def depth_BT(self) -> Tensor:
        """Recursions that each token took; 0 at padding."""
        return self.tokens.unpack(self.depth_M)

    def selected_BT(self, recursion: int) -> Tensor:
        """Whether each token took this recursion (counted from 0)."""
        return self.tokens.unpack(self.selected_M(recursion))

    def logit_BT(self, recursion: int) -> Tensor:
        """Router logits; NaN where the token was no candidate."""
        step = self.steps[recursion]
        if step.logit_C is None:
            raise ValueError("this router has no logits: fixed and random routers score nothing")
        return self._spread(step.candidate_C, step.logit_C, float("nan"))

    def gate_BT(self, recursion: int) -> Tensor:
        """Weight of the stack's output; NaN where the token was not selected."""
        step = self.steps[recursion]
        gate_K = torch.ones(len(step.tokens)) if step.gate_K is None else step.gate_K
        return self._spread(step.index_K, gate_K, float("nan"))

    def tokens_per_recursion(self) -> list[int]:
        return [len(step.tokens) for step in self.steps]

    def _spread(self, index: Tensor | None, values: Tensor, fill: float) -> Tensor:
        device = self.tokens.row_M.device
        full_M = torch.full((len(self.tokens),), fill, dtype=values.dtype, device=device)
        full_M[slice(None) if index is None else index] = values.detach().to(device)
        return self.tokens.unpack(full_M, fill)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "none": lambda logits: logits,
    "softmax": lambda logits: logits.softmax(-1),
}

# How the gated output of the stack joins the state it started from.
GATES: dict[str, Callable[[Tensor, Tensor, Tensor | float], Tensor]] = {
    "paper": lambda h, out, gate: h + gate * out,
    "residual": lambda h, out, gate: h + gate * (out - h),
}


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def router_logits(net: nn.Module, x_MD: Tensor) -> Tensor:
    """``net(x)`` in the precision of its weights, also under autocast: bf16 has too few digits to
    rank tokens by."""
    with torch.autocast(x_MD.device.type, enabled=False):
        return at_least_fp32(net(x_MD.to(next(net.parameters()).dtype)))


def score_net(architecture: str, dim: int, outputs: int) -> nn.Module:
    """The router's network: linear, or one hidden layer of width dim or 4 * dim."""
    if architecture == "linear":
        return nn.Linear(dim, outputs, bias=False)
    hidden = dim if architecture == "mlp" else 4 * dim
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, outputs, bias=False)
    )


def top_k(
    score_C: Tensor,
    tokens: PackedTokens,
    length_B: Tensor,
    full_per_row: int | None,
    capacity: float,
) -> tuple[Tensor, int | None]:
    """The max(1, int(capacity * length)) best-scored tokens of each row; ties go to the earlier
    token.

    length_B: full length of each sequence, which capacities refer to; full_per_row: the same as one
    number where all are equal. Returns ascending indices and the number per row (None if they
    differ).
    """
    score_AC = tokens.pad(score_C, fill=float("-inf"))  # padding never competes
    order_AC = score_AC.argsort(dim=1, descending=True, stable=True)
    if tokens.per_row is not None and full_per_row is not None:
        k = min(max(1, int(capacity * full_per_row)), tokens.per_row)
        start_B = torch.arange(tokens.num_rows, device=score_C.device)[:, None] * tokens.per_row
        return (order_AC[:, :k].sort(dim=1).values + start_B).flatten(), k
    k_B = (capacity * length_B.double()).long().clamp(min=1)
    k_A = (k_B if tokens.rows is None else k_B[tokens.rows])[:, None]
    rank_AC = order_AC.argsort(dim=1)
    return (tokens.unpad(rank_AC) < tokens.unpad(k_A.expand_as(rank_AC))).nonzero().squeeze(1), None


class Router(nn.Module):
    """Base of all routers: every token takes every recursion, and the stack's output replaces the
    state."""

    has_topk = False

    def __init__(self, config: RouterConfig, dim: int, num_recursions: int) -> None:
        super().__init__()
        self.config, self.num_recursions = config, num_recursions

    @classmethod
    def of(cls, config: ModelConfig) -> Router:
        """The router of a model."""
        return cls(config.router, config.dim, config.num_recursions)

    def start(self, x_MD: Tensor, routing: Routing) -> None:
        """Called once before the first recursion."""

    def select(self, recursion: int, x_MD: Tensor, routing: Routing) -> RoutingStep:
        return RoutingStep(recursion, routing.tokens)

    def takes(
        self, recursion: int, h_MD: Tensor, routing: Routing
    ) -> tuple[Tensor | None, Tensor | None]:
        """Threshold selection of candidates as a mask (None: all), and the gate of each (None: 1).

        What :meth:`select` decides, for tokens that are all candidates, in static shapes.
        """
        return None, None

    def combine(
        self, step: RoutingStep, h_KD: Tensor, out_KD: Tensor, first_MD: Tensor, routing: Routing
    ) -> Tensor:
        """New state of the selected tokens. h: before the pass; out: the stack's output; first:
        before all passes."""
        return out_KD


class FixedDepthRouter(Router):
    """The Recursive Transformer."""


class ExpertChoiceRouter(Router):
    """Each recursion picks its tokens (arXiv 2507.10524, expert-choice routing).

    Training selects with ``topk``, which compares a token with later ones. ``threshold`` looks at
    the token alone: its logit (the router's own or the auxiliary router's) against ``threshold_R``.
    """

    has_topk = True
    threshold_R: Tensor

    def __init__(self, config: RouterConfig, dim: int, num_recursions: int) -> None:
        super().__init__(config, dim, num_recursions)
        self.score, self.gate = SCORES[config.score_name], GATES[config.gate]
        self.nets = nn.ModuleList(
            score_net(config.architecture, dim, 1) for _ in range(num_recursions)
        )
        own = config.causal_selection == "aux_router"
        self.aux_nets = nn.ModuleList(
            score_net(config.architecture, dim, 1) for _ in range(num_recursions if own else 0)
        )
        self.register_buffer("threshold_R", torch.full((num_recursions,), 0.5))

    def select(self, recursion: int, x_MD: Tensor, routing: Routing) -> RoutingStep:
        candidate_C, tokens = None, routing.tokens
        if self.config.hierarchical and routing.steps:
            candidate_C, tokens = routing.steps[-1].index_K, routing.steps[-1].tokens
        logit_C, causal_C = self._logits(
            recursion, x_MD if candidate_C is None else take(x_MD, candidate_C)
        )
        kept_K, per_row = self._keep(recursion, logit_C, causal_C, tokens, routing)
        if routing.selection == "topk":
            self._add_losses(logit_C, causal_C, kept_K, routing)
        gate_K = self.config.gate_scale * self.score(logit_C if kept_K is None else logit_C[kept_K])
        if kept_K is None:
            index_K = candidate_C
        else:
            index_K = kept_K if candidate_C is None else candidate_C[kept_K]
            tokens = tokens.select(kept_K, per_row)
        return RoutingStep(recursion, tokens, index_K, gate_K, candidate_C, logit_C, causal_C)

    def takes(
        self, recursion: int, h_MD: Tensor, routing: Routing
    ) -> tuple[Tensor | None, Tensor | None]:
        logit_M, causal_M = self._logits(recursion, h_MD)
        takes_M = (
            None
            if routing.capacities[recursion] == 1
            else self._passes_threshold(recursion, causal_M)
        )
        return takes_M, self.config.gate_scale * self.score(logit_M)

    def _logits(self, recursion: int, h_CD: Tensor) -> tuple[Tensor, Tensor]:
        """The router's logits, and those that threshold selection looks at."""
        logit_C = router_logits(self.nets[recursion], h_CD).squeeze(-1)
        if not self.aux_nets:
            return logit_C, logit_C
        return logit_C, router_logits(self.aux_nets[recursion], h_CD.detach()).squeeze(-1)

    def _passes_threshold(self, recursion: int, causal_C: Tensor) -> Tensor:
        return causal_C.sigmoid() > self.threshold_R[recursion]

    def combine(
        self, step: RoutingStep, h_KD: Tensor, out_KD: Tensor, first_MD: Tensor, routing: Routing
    ) -> Tensor:
        assert step.gate_K is not None
        return self.gate(h_KD, out_KD, step.gate_K[:, None].to(out_KD.dtype))

    def _keep(
        self,
        recursion: int,
        logit_C: Tensor,
        causal_C: Tensor,
        tokens: PackedTokens,
        routing: Routing,
    ) -> tuple[Tensor | None, int | None]:
        """Which candidates are selected (ascending; None: all), and how many per row."""
        capacity = routing.capacities[recursion]
        if capacity == 1:
            return None, tokens.per_row
        if routing.selection == "topk":
            # The logit ranks as the score does and does not saturate.
            return top_k(
                logit_C.detach(), tokens, routing.tokens.count_B, routing.tokens.per_row, capacity
            )
        return self._passes_threshold(recursion, causal_C).nonzero().squeeze(1), None

    def _add_losses(
        self, logit_C: Tensor, causal_C: Tensor, kept_K: Tensor | None, routing: Routing
    ) -> None:
        target_C = (
            torch.ones_like(logit_C)
            if kept_K is None
            else torch.zeros_like(logit_C).index_fill(0, kept_K, 1.0)
        )
        bce = F.binary_cross_entropy_with_logits(causal_C, target_C)
        routing.add_loss("selection", bce, self.config.selection_weight)
        if self.config.z_loss_weight:
            routing.add_loss("z_loss", logit_C.square().mean(), self.config.z_loss_weight)


def alone(x: Tensor) -> Tensor:
    """Mean over the ranks of a run, if there is one only."""
    return x


class TokenChoiceRouter(Router):
    """Each token picks its depth once, from its state before the first recursion (arXiv 2507.10524,
    token-choice).

    mean_over_ranks: averages a tensor over all processes of a run, so that all balance the same
    load.
    """

    bias_R: Tensor
    mean_over_ranks: Callable[[Tensor], Tensor] = staticmethod(alone)

    def __init__(self, config: RouterConfig, dim: int, num_recursions: int) -> None:
        super().__init__(config, dim, num_recursions)
        self.score, self.gate = SCORES[config.score_name], GATES[config.gate]
        self.net = score_net(config.architecture, dim, num_recursions)
        self.register_buffer("bias_R", torch.zeros(num_recursions))
        self.combine_form = {"last": self._gate_last, "every": self._gate_every}[config.combination]

    def start(self, x_MD: Tensor, routing: Routing) -> None:
        logit_MR = router_logits(self.net, x_MD)
        score_MR = self.score(logit_MR)
        choice_M = (score_MR + self.bias_R).argmax(-1) + 1  # the bias balances, it does not gate
        routing.logit_MR, routing.score_MR = logit_MR, score_MR
        routing.choice_M = choice_M.clamp(max=routing.max_depth)
        if self.config.balancing == "loss":
            share_R = tally(choice_M - 1, self.num_recursions) / choice_M.numel()
            share_R = self.mean_over_ranks(share_R)
            mean_R = (score_MR / score_MR.sum(-1, keepdim=True)).mean(0)
            balance = self.num_recursions * (share_R * mean_R).sum()
            routing.add_loss("balancing", balance, self.config.balancing_weight)
        if self.config.z_loss_weight:
            routing.add_loss(
                "z_loss", logit_MR.logsumexp(-1).square().mean(), self.config.z_loss_weight
            )

    def select(self, recursion: int, x_MD: Tensor, routing: Routing) -> RoutingStep:
        assert (
            routing.choice_M is not None
            and routing.score_MR is not None
            and routing.logit_MR is not None
        )
        gate_M, logit_M = (
            self.config.gate_scale * routing.score_MR[:, recursion],
            routing.logit_MR[:, recursion],
        )
        if recursion == 0:  # every token takes at least one
            return RoutingStep(0, routing.tokens, None, gate_M, None, logit_M, logit_M)
        index_K = (routing.choice_M > recursion).nonzero().squeeze(1)
        return RoutingStep(
            recursion,
            routing.tokens.select(index_K),
            index_K,
            gate_M[index_K],
            None,
            logit_M,
            logit_M,
        )

    def takes(
        self, recursion: int, h_MD: Tensor, routing: Routing
    ) -> tuple[Tensor | None, Tensor | None]:
        assert routing.choice_M is not None and routing.score_MR is not None
        takes_M = None if recursion == 0 else routing.choice_M > recursion
        return takes_M, self.config.gate_scale * routing.score_MR[:, recursion]

    def combine(
        self, step: RoutingStep, h_KD: Tensor, out_KD: Tensor, first_MD: Tensor, routing: Routing
    ) -> Tensor:
        assert routing.choice_M is not None and step.gate_K is not None
        index = slice(None) if step.index_K is None else step.index_K
        last_K1 = (routing.choice_M[index] == step.recursion + 1)[:, None]
        return self.combine_form(
            out_KD, first_MD[index], step.gate_K[:, None].to(out_KD.dtype), last_K1
        )

    def _gate_last(
        self, out_KD: Tensor, first_KD: Tensor, gate_K1: Tensor, last_K1: Tensor
    ) -> Tensor:
        return torch.where(last_K1, self.gate(first_KD, out_KD, gate_K1), out_KD)

    def _gate_every(
        self, out_KD: Tensor, first_KD: Tensor, gate_K1: Tensor, last_K1: Tensor
    ) -> Tensor:
        return gate_K1 * out_KD + last_K1 * first_KD

    @torch.no_grad()
    def update_bias(self, load_R: Tensor) -> None:
        """Loss-free balancing, once per optimizer step. load_R: tokens that chose each depth."""
        load_R = self.mean_over_ranks(load_R.to(self.bias_R))
        self.bias_R += self.config.bias_update_rate * torch.sign(load_R.mean() - load_R)


class RandomRouter(Router):
    """The control: depth is drawn from (seed, token, position), so it is causal and the same
    everywhere."""

    has_topk = True

    def __init__(self, config: RouterConfig, dim: int, num_recursions: int) -> None:
        super().__init__(config, dim, num_recursions)
        self.gate = GATES[config.gate]

    def need(self, tokens: PackedTokens) -> Tensor:
        """Who goes first, (M,), evenly spread over [0, 1): a recursion of capacity c takes those
        from 1 - c on."""
        return hash_uniform(self.config.seed, tokens.id_M, tokens.position_M)

    def select(self, recursion: int, x_MD: Tensor, routing: Routing) -> RoutingStep:
        all_tokens, capacity = routing.tokens, routing.capacities[recursion]
        if capacity == 1:
            return RoutingStep(recursion, all_tokens)
        need_M = self.need(all_tokens)
        if routing.selection == "topk":
            index_K, per_row = top_k(
                need_M, all_tokens, all_tokens.count_B, all_tokens.per_row, capacity
            )
        else:
            index_K, per_row = (need_M >= 1 - capacity).nonzero().squeeze(1), None
        return RoutingStep(recursion, all_tokens.select(index_K, per_row), index_K)

    def takes(
        self, recursion: int, h_MD: Tensor, routing: Routing
    ) -> tuple[Tensor | None, Tensor | None]:
        capacity = routing.capacities[recursion]
        return None if capacity == 1 else self.need(routing.tokens) >= 1 - capacity, None

    def combine(
        self, step: RoutingStep, h_KD: Tensor, out_KD: Tensor, first_MD: Tensor, routing: Routing
    ) -> Tensor:
        return self.gate(h_KD, out_KD, self.config.gate_scale)


class PositionRouter(RandomRouter):
    """A baseline: depth follows from the position alone, spread as evenly over positions as can
    be."""

    def need(self, tokens: PackedTokens) -> Tensor:
        # multiples of the golden ratio fill [0, 1) evenly
        return (tokens.position_M.double() * ((5**0.5 - 1) / 2)) % 1


class FrequencyRouter(RandomRouter):
    """A baseline: the rarer a token, the deeper it goes. Knows no more than how often each token
    occurs."""

    need_V: Tensor

    def __init__(
        self, config: RouterConfig, dim: int, num_recursions: int, vocab_size: int
    ) -> None:
        super().__init__(config, dim, num_recursions)
        self.register_buffer("need_V", torch.zeros(vocab_size))
        self.set_counts(torch.ones(vocab_size))

    @classmethod
    def of(cls, config: ModelConfig) -> Router:
        return cls(config.router, config.dim, config.num_recursions, config.vocab_size)

    @torch.no_grad()
    def set_counts(self, count_V: Tensor) -> None:
        """count_V: occurrences of each token in training text. need is the share of text in more
        frequent tokens."""
        order_V = count_V.argsort(descending=True, stable=True)
        ordered_V = count_V[order_V].double()
        middle_V = (ordered_V.cumsum(0) - ordered_V / 2) / ordered_V.sum().clamp(min=1)
        self.need_V[order_V] = middle_V.to(self.need_V)

    def need(self, tokens: PackedTokens) -> Tensor:
        return self.need_V[tokens.id_M]


ROUTERS: dict[str, type[Router]] = {
    "fixed": FixedDepthRouter,
    "expert_choice": ExpertChoiceRouter,
    "token_choice": TokenChoiceRouter,
    "random": RandomRouter,
    "position": PositionRouter,
    "frequency": FrequencyRouter,
}


def build_router(config: ModelConfig) -> Router:
    return ROUTERS[config.router.kind].of(config)
