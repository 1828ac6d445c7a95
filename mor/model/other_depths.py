"""The same weights under other decisions: depths from a table, more recursions than were trained.

These routers go around the one that a model was trained with, and are given to a forward:
``model(tokens, router=ForcedRouter(model.router, taken_RM))``. Nothing is copied.

M packed tokens · C candidates · K selected · D model · R recursions
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mor.model.packing import PackedTokens
from mor.model.random import hash_uniform
from mor.model.routers import Router
from mor.model.routing import AuxiliaryLoss, Decision, Memory, Routing


class RouterAround(Router):
    """A router that asks another one and changes some of its answers. Nothing is copied.

    num_recursions: None for as many as the other has.
    """

    def __init__(self, inner: Router, num_recursions: int | None = None) -> None:
        super().__init__(inner.config, 0, num_recursions or inner.num_recursions)
        self.inner = inner
        self.is_hierarchical, self.has_topk = inner.is_hierarchical, inner.has_topk
        self.is_learned = inner.is_learned

    @property
    def may_return(self) -> bool:
        return self.inner.may_return

    def start(self, x_MD: Tensor, tokens: PackedTokens, max_depth: int) -> Memory:
        return self.inner.start(x_MD, tokens, max_depth)

    def decide(
        self, recursion: int, h_CD: Tensor, tokens: PackedTokens, memory: Memory, capacity: float
    ) -> Decision:
        return self.inner.decide(recursion, h_CD, tokens, memory, capacity)

    def combine(
        self,
        recursion: int | Tensor,
        h_KD: Tensor,
        out_KD: Tensor,
        gate: Tensor | None,
        memory: Memory,
    ) -> Tensor:
        return self.inner.combine(recursion, h_KD, out_KD, gate, memory)

    def chosen_depth(self, memory: Memory) -> Tensor | None:
        return self.inner.chosen_depth(memory)

    def with_depth(self, memory: Memory, depth: Tensor) -> Memory:
        return self.inner.with_depth(memory, depth)

    def losses(self, routing: Routing) -> dict[str, AuxiliaryLoss]:
        return self.inner.losses(routing)

    def threshold(self, recursion: int) -> float | None:
        return self.inner.threshold(recursion)

    def shown_score(self, routing: Routing, recursion: int) -> Tensor | None:
        return self.inner.shown_score(routing, recursion)


class ForcedRouter(RouterAround):
    """Depths come from a table; gates and everything else are those of the router inside.

    taken_RM: whether each packed token of the forward takes each recursion.
    """

    def __init__(self, inner: Router, taken_RM: Tensor) -> None:
        super().__init__(inner)
        self.is_hierarchical = self.has_topk = False
        self.taken_RM = taken_RM

    @property
    def may_return(self) -> bool:
        return bool((self.taken_RM[1:] & ~self.taken_RM[:-1]).any())

    def start(self, x_MD: Tensor, tokens: PackedTokens, max_depth: int) -> Memory:
        expected = (self.num_recursions, len(tokens))
        if self.taken_RM.shape != expected:
            raise ValueError(
                f"the table of depths has shape {tuple(self.taken_RM.shape)}, but this forward has "
                f"{expected[0]} recursions and {expected[1]} tokens; it needs shape {expected}"
            )
        memory = self.inner.start(x_MD, tokens, max_depth)
        return self.inner.with_depth(memory, self.taken_RM[:max_depth].sum(0))

    def decide(
        self, recursion: int, h_CD: Tensor, tokens: PackedTokens, memory: Memory, capacity: float
    ) -> Decision:
        decided = self.inner.decide(recursion, h_CD, tokens, memory, capacity)
        return replace(decided, takes=self.taken_RM[recursion], rank=None)


class ExploringRouter(RouterAround):
    """Some tokens go on against the word of the router inside, as training needs it to know what
    that would have gained. share: of those that would stop; seed: others for each step."""

    def __init__(self, inner: Router, share: float, seed: int) -> None:
        super().__init__(inner)
        self.share, self.seed = share, seed

    def decide(
        self, recursion: int, h_CD: Tensor, tokens: PackedTokens, memory: Memory, capacity: float
    ) -> Decision:
        decided = self.inner.decide(recursion, h_CD, tokens, memory, capacity)
        if decided.takes is None:
            return decided
        drawn = hash_uniform(self.seed, recursion, tokens.place) < self.share
        return replace(decided, takes=decided.takes | drawn)


class RepeatLastRouter(RouterAround):
    """More recursions than were trained: each further one decides and gates as the last trained one
    does.

    Expert-choice: the last score net and threshold, on the new state. Token-choice: tokens that
    chose the last depth go on to the end, with that depth's gate. Fixed and random: the same tokens
    again. Raises ValueError for fewer recursions, and for a vanilla model, which has no recursion
    to repeat.
    """

    def __init__(self, inner: Router, num_recursions: int) -> None:
        trained = inner.num_recursions
        if trained == 1:
            raise ValueError(
                "a model with one recursion was never trained to repeat its layers; "
                "there is nothing to extend"
            )
        if num_recursions < trained:
            raise ValueError(
                f"the model has {trained} recursions already; "
                f"cap it with max_depth={num_recursions} instead"
            )
        super().__init__(inner, num_recursions)

    def start(self, x_MD: Tensor, tokens: PackedTokens, max_depth: int) -> Memory:
        trained = self.inner.num_recursions
        memory = self.inner.start(x_MD, tokens, min(max_depth, trained))
        depth = self.inner.chosen_depth(memory)
        if depth is None:
            return memory
        return self.inner.with_depth(memory, depth.masked_fill(depth >= trained, max_depth))

    def decide(
        self, recursion: int, h_CD: Tensor, tokens: PackedTokens, memory: Memory, capacity: float
    ) -> Decision:
        return self.inner.decide(self._trained(recursion), h_CD, tokens, memory, capacity)

    def threshold(self, recursion: int) -> float | None:
        return self.inner.threshold(self._trained(recursion))

    def _trained(self, recursion: int) -> int:
        """The trained recursion that this one does as."""
        return min(recursion, self.inner.num_recursions - 1)
