"""Other rules that choose which tokens of a trained model go deeper: what learning is worth there.

The weights, gates, keys and values are the model's own; nothing is trained. ``random``,
``position`` and ``frequency`` look at the input alone and are given the share of tokens that each
recursion is to have. ``confidence`` looks at what the model would predict.

B rows · T columns · C candidates · D model · M packed tokens · V vocab
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mor.data.stream import Batch
from mor.evaluation.calibrate import threshold_for
from mor.model.budget import EVERYONE, BudgetRouter
from mor.model.config import ModelConfig
from mor.model.loss import CHUNK_LOGITS
from mor.model.other_depths import RouterAround
from mor.model.packing import PackedTokens, pack
from mor.model.random import hash_uniform
from mor.model.routers import ROUTERS, Router, evenly_by_position
from mor.model.routing import Decision, Memory
from mor.model.scratch import Scratch
from mor.model.transformer import Transformer, rotary_angles

Chooser = Literal["random", "position", "frequency", "confidence"]
Need = Callable[[PackedTokens], Tensor]
"""Who goes first, (M,), spread evenly over [0, 1)."""


def check_can_choose(config: ModelConfig) -> None:
    """Raise ValueError for a model whose tokens no other rule can send to other depths."""
    kind = ROUTERS[config.router.kind]
    if not kind.is_learned or config.router.kind == "token_choice":
        raise ValueError(
            "choosers stand in for a router that learns and decides at each recursion, such as "
            f"expert_choice; this one is {config.router.kind}"
        )


def need_of(chooser: Chooser, token_counts: Tensor) -> Need:
    """The rule of random, position or frequency. token_counts: occurrences of each token in the
    training text, (V,)."""
    needs: dict[str, Need] = {
        "random": lambda tokens: hash_uniform(0, tokens.ids, tokens.position),
        "position": evenly_by_position,
        "frequency": _rare_first(token_counts),
    }
    return needs[chooser]


def _rare_first(count: Tensor) -> Need:
    """The rarer a token, the more it needs; its occurrences share the range that is theirs by
    position, so that any share of tokens can be had."""
    order = count.argsort(descending=True, stable=True)
    ordered = count[order].double() / count.sum()
    width, start = torch.zeros(2, len(count), dtype=torch.float64)
    width[order], start[order] = ordered, ordered.cumsum(0) - ordered

    def need(tokens: PackedTokens) -> Tensor:
        ids, here = tokens.ids, tokens.ids.device
        needs: Tensor = start.to(here)[ids] + width.to(here)[ids] * evenly_by_position(tokens)
        return needs

    return need


class NeedRouter(RouterAround):
    """The router inside, with another opinion of who needs a recursion."""

    def __init__(self, inner: Router, need: Need) -> None:
        super().__init__(inner)
        self.need = need

    def urge(
        self,
        recursion: int,
        decision: Decision | None,
        tokens: PackedTokens | None,
        memory: Memory,
    ) -> Tensor:
        assert tokens is not None
        return self.need(tokens)


def by_need(model: Transformer, need: Need, shares: Sequence[float], batch: Batch) -> Router:
    """The router that gives each recursion this share of all tokens, those that need it most.
    batch: the text that the thresholds for this are fitted to."""
    device = model.embedding.weight.device
    here = batch.to(device)
    needs = need(pack(here.tokens_BT, documents_BT=here.documents_BT))
    counts = [round(share * len(needs)) for share in shares[1:]]
    row = [EVERYONE, *(threshold_for(needs, count) for count in counts)]
    threshold_1R = torch.tensor([row], dtype=needs.dtype, device=device)
    return BudgetRouter(NeedRouter(model.router, need), threshold_1R, with_own=False)


class ConfidenceRouter(BudgetRouter):
    """A token goes on while the model is unsure of what comes next: coda and head are applied to
    its state before each recursion, and the log-odds against the likeliest token are what the
    thresholds look at.

    The recursions attend to what tokens really left, as ever. The coda of this question sees every
    earlier token as it is by then: its last state if it has left, else the one at this recursion.
    So the rule is causal, and measured by whole forwards alone: a decoder would have to keep the
    coda's keys and values of each recursion.
    """

    going: Tensor
    """Those that took the recursion before, (M,)."""

    def __init__(self, model: Transformer, threshold_1R: Tensor) -> None:
        super().__init__(model.router, threshold_1R, with_own=False)
        self.is_hierarchical = False  # it looks at the states of those that left, too
        self.doubt = partial(doubt, model)

    @property
    def may_return(self) -> bool:
        return False

    def decide(
        self, recursion: int, h_CD: Tensor, tokens: PackedTokens, memory: Memory, capacity: float
    ) -> Decision:
        decided = self.inner.decide(self._trained(recursion), h_CD, tokens, memory, capacity)
        if recursion == 0:
            self.going = torch.ones_like(tokens.row, dtype=torch.bool)
            return replace(decided, takes=None, rank=None)
        if self.going.any():
            unsure = self.doubt(h_CD, tokens) >= memory["threshold"][:, recursion]
            self.going = self.going & unsure
        return replace(decided, takes=self.going, rank=None)


def doubt(model: Transformer, x_MD: Tensor, tokens: PackedTokens) -> Tensor:
    """Log-odds against the likeliest next token, (M,), if all tokens were to leave the recursions
    with these states. Unlike a probability it does not saturate."""
    angles = rotary_angles(tokens.position, model.config.head_dim, model.config.rope_theta)
    everyone = Scratch(kept=()).open(0, (0,), tokens)
    for layer, block in enumerate(model.coda, start=len(model.prelude)):
        x_MD = block(x_MD, angles, everyone, layer)
    rows = max(1, CHUNK_LOGITS // model.config.vocab_size)
    return torch.cat([_odds_against_likeliest(model.predict(x)) for x in x_MD.split(rows)])


def _odds_against_likeliest(logits_MV: Tensor) -> Tensor:
    best_M1, place_M1 = logits_MV.float().max(-1, keepdim=True)
    others_MV = logits_MV.float().scatter(1, place_M1, float("-inf"))
    return others_MV.logsumexp(-1) - best_M1.squeeze(1)
