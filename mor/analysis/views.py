"""The same weights under other decisions: forced depths, more recursions than were trained, a look
inside.

A view is a Transformer that shares every weight with the model it was made from; only the router
differs.

M packed tokens · K selected · D model · R recursions
"""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor

from mor.model.routing import Router, Routing, RoutingStep
from mor.model.transformer import Transformer, passes


class _Wrapped(Router):
    """Does what another router does; subclasses change one thing."""

    def __init__(self, router: Router, num_recursions: int | None = None) -> None:
        super().__init__(router.config, 0, num_recursions or router.num_recursions)
        self.router = router

    def start(self, x_MD: Tensor, routing: Routing) -> None:
        self.router.start(x_MD, routing)

    def select(self, recursion: int, x_MD: Tensor, routing: Routing) -> RoutingStep:
        return self.router.select(recursion, x_MD, routing)

    def combine(
        self, step: RoutingStep, h_KD: Tensor, out_KD: Tensor, first_MD: Tensor, routing: Routing
    ) -> Tensor:
        return self.router.combine(step, h_KD, out_KD, first_MD, routing)


class TableRouter(_Wrapped):
    """Takes its decisions from a table; gates and everything else are those of the router inside.

    taken_RM: whether each packed token takes each recursion.
    """

    def __init__(self, router: Router, taken_RM: Tensor) -> None:
        super().__init__(router)
        self.taken_RM = taken_RM

    def start(self, x_MD: Tensor, routing: Routing) -> None:
        super().start(x_MD, routing)
        if routing.choice_M is not None:
            routing.choice_M = self.taken_RM.sum(0)

    def select(self, recursion: int, x_MD: Tensor, routing: Routing) -> RoutingStep:
        index_K = self.taken_RM[recursion].nonzero().squeeze(1)
        _, gate_M = self.router.takes(recursion, x_MD, routing)
        gate_K = None if gate_M is None else gate_M[index_K]
        return RoutingStep(recursion, routing.tokens.select(index_K), index_K, gate_K)


class RepeatLastRouter(_Wrapped):
    """More recursions than were trained: each further one decides and gates as the last trained one
    does.

    Expert-choice: the last score net and threshold, on the new state. Token-choice: tokens that
    chose the last depth go on to the end, with that depth's gate. Fixed and random: the same tokens
    again.
    """

    def start(self, x_MD: Tensor, routing: Routing) -> None:
        super().start(x_MD, routing)
        if routing.choice_M is not None:
            to_the_end_M = routing.choice_M >= self.router.num_recursions
            routing.choice_M = routing.choice_M.masked_fill(to_the_end_M, routing.max_depth)

    def select(self, recursion: int, x_MD: Tensor, routing: Routing) -> RoutingStep:
        trained = min(recursion, self.router.num_recursions - 1)
        return replace(self.router.select(trained, x_MD, routing), recursion=recursion)


class StateRecorder(_Wrapped):
    """Keeps every token's state before the first pass and after each one. For one forward at a
    time."""

    def __init__(self, router: Router) -> None:
        super().__init__(router)
        self.states_MD: list[Tensor] = []

    def start(self, x_MD: Tensor, routing: Routing) -> None:
        self.states_MD = [x_MD]
        super().start(x_MD, routing)

    def select(self, recursion: int, x_MD: Tensor, routing: Routing) -> RoutingStep:
        step = super().select(recursion, x_MD, routing)
        if not len(step.tokens):  # nobody goes in, so combine will not be asked
            self.states_MD.append(x_MD)
        return step

    def combine(
        self, step: RoutingStep, h_KD: Tensor, out_KD: Tensor, first_MD: Tensor, routing: Routing
    ) -> Tensor:
        new_KD = super().combine(step, h_KD, out_KD, first_MD, routing)
        before_MD, index_K = self.states_MD[-1], step.index_K
        self.states_MD.append(
            new_KD if index_K is None else before_MD.index_copy(0, index_K, new_KD)
        )
        return new_KD


def with_router(model: Transformer, router: Router) -> Transformer:
    """The model with other decisions; nothing is copied."""
    recursions = model.recursions
    same = (*model.children(), *recursions.children(), model.config)
    view = copy.deepcopy(model, {id(part): part for part in same if part is not recursions})
    view.recursions.router = router
    if router.num_recursions != model.config.num_recursions:
        view.config = model.config.with_recursions(router.num_recursions)
        view.recursions.passes = passes(view.config)
    return view


def extended(model: Transformer, num_recursions: int) -> Transformer:
    """The model with more recursions than it was trained with (see :class:`RepeatLastRouter`): an
    extrapolation.

    Raises ValueError for fewer, and for a vanilla model, which has no recursion to repeat.
    """
    trained = model.config.num_recursions
    if trained == 1:
        raise ValueError(
            "a model with one recursion was never trained to repeat its layers; there is nothing "
            "to extend"
        )
    if num_recursions < trained:
        raise ValueError(
            f"the model has {trained} recursions already; cap it with max_depth={num_recursions} "
            "instead"
        )
    return with_router(model, RepeatLastRouter(model.recursions.router, num_recursions))
