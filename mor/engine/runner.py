"""The model, one slot at a time and at any mixture of depths.

Does what ``Transformer.forward`` does to a token, cut where a token may wait for others: ``enter``
(embedding, prelude), ``block`` (one pass of the shared stack, then routing) and ``coda``, ``head``.
All state is in tensors, and shapes depend on the number of slots given alone.

A rows that hold tokens · D model · M lanes · R recursions · S slots · T columns
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mor.engine.kv_passes import LanePass, PagedBatch
from mor.engine.paged_kv import PagedKV
from mor.model.budget import Budget, BudgetRouter, has_depths
from mor.model.compiling import compiled
from mor.model.packing import PackedTokens
from mor.model.routers import Router, at_least_fp32
from mor.model.routing import Memory
from mor.model.transformer import Angles, Logits, Output, Transformer, passes, rotary_angles


class Runner:
    """State of the newest token of every slot. ``stage`` counts the passes it has behind it,
    skipped ones included.

    max_depth: caps the recursions of every token; then there are no depth budgets. longest: if
    given, attention is sized for so many entries and nothing is looked up on the device; then, what
    stands between the layers can be compiled too. ``model_s`` adds up the seconds inside the
    model's layers, router and head.
    """

    def __init__(
        self,
        model: Transformer,
        kv: PagedKV,
        *,
        max_depth: int | None = None,
        longest: int | None = None,
        compiled: bool = False,
    ) -> None:
        config, device = model.config, model.embedding.weight.device
        self.model, self.kv, self.longest = model, kv, longest
        self.max_depth, trained = max_depth or kv.num_recursions, config.num_recursions
        further = config.capacities[-1:] * (kv.num_recursions - trained)
        self.capacities = (*config.capacities, *further)
        self.budgets = [Budget(trained, (), own=True)] * (kv.num_slots + 1)
        rows = [budget.row(kv.num_recursions) for budget in self.budgets]
        self.threshold_SR, self.budget_router = torch.tensor(rows, device=device), None
        if has_depths(config) and max_depth is None:
            self.budget_router = BudgetRouter(model.router, self.threshold_SR[:1].clone())
        self.router: Router = self.budget_router or model.router
        self.passes = passes(config, self.max_depth)
        # One more: where a token is that took its last pass. It has no recursion of its own.
        self.recursion = torch.tensor(
            [*(recursion for recursion, _ in self.passes), 0], device=device
        )
        slots = kv.num_slots + 1
        self.h_SD = torch.zeros(
            slots, config.dim, dtype=model.embedding.weight.dtype, device=device
        )
        self.gate = at_least_fp32(self.h_SD.new_ones(slots))  # 1 where the router has none
        self.ids, self.position, self.stage = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.took_SR = torch.zeros(slots, kv.num_recursions, dtype=torch.bool, device=device)
        angles = rotary_angles(
            torch.arange(kv.max_len, device=device), config.head_dim, config.rope_theta
        )
        # Converted once, not in every layer.
        self.angles = angles[0].to(self.h_SD.dtype), angles[1].to(self.h_SD.dtype)
        # Started on nothing, the router shows what it will want to remember of each token.
        tokens = _tokens(self.ids, self.position)
        with torch.no_grad():
            memory = model.recursions.start(model.router, self.h_SD, tokens, self.max_depth)
        self.memory: Memory = {name: value.clone() for name, value in memory.items()}
        if self.budget_router is not None:
            self.memory["threshold"] = self.threshold_SR
        self.model_s = 0.0
        self.compiled = compiled and longest is not None
        if self.compiled:
            compile_methods(
                self, "_open_own", "_begin_token", "_settle", "_begin_pass", "_end_pass"
            )

    @contextmanager
    def _in_model(self) -> Iterator[None]:
        if torch.compiler.is_compiling():
            yield
            return
        start = time.perf_counter()
        yield
        self.model_s += time.perf_counter() - start

    def give_budgets(self, budgets: Mapping[int, Budget]) -> None:
        """Depth budgets by slot, of all running requests, for the tokens that come next."""
        if self.budget_router is None:
            return
        if new := {slot: b for slot, b in budgets.items() if self.budgets[slot] != b}:
            rows = [budget.row(self.kv.num_recursions) for budget in new.values()]
            places = torch.tensor(list(new), device=self.threshold_SR.device)
            self.threshold_SR[places] = torch.tensor(rows, device=self.threshold_SR.device)
            for slot, budget in new.items():
                self.budgets[slot] = budget
        if self.longest is None:  # else what is recorded or compiled must serve every mixture
            own = [budget.own for budget in budgets.values()]
            self.budget_router.with_own = any(own)
            # Further recursions are passes of this runner, and the model's router knows of none.
            is_plain = all(own) and self.kv.num_recursions == self.model.config.num_recursions
            self.router = self.model.router if is_plain else self.budget_router

    def _router_of(self, slots: Sequence[int]) -> Router | None:
        """For an ordinary forward with a row for each slot; None: the model's own."""
        budgets = [self.budgets[slot] for slot in slots]
        if all(budget.own for budget in budgets):
            return None
        most = max(budget.recursions for budget in budgets)
        with_own = any(budget.own for budget in budgets)
        rows = self.threshold_SR[list(slots), :most]
        return BudgetRouter(self.model.router, rows, with_own=with_own)

    def read(
        self,
        slots: Sequence[int],
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        logits: Logits,
    ) -> Output:
        """Several tokens of each slot in an ordinary forward."""
        width, device = max(map(len, ids)), self.h_SD.device
        tokens_AT = torch.tensor([[*i, *[0] * (width - len(i))] for i in ids], device=device)
        mask_AT = torch.arange(width, device=device) < torch.tensor(
            [[len(i)] for i in ids], device=device
        )
        cache, router = PagedBatch(self.kv, slots, starts), self._router_of(slots)
        deepest = (router or self.model.router).num_recursions
        with self._in_model():
            return self.model(
                tokens_AT,
                mask_BT=mask_AT,
                cache=cache,
                logits=logits,
                max_depth=min(self.max_depth, deepest),
                router=router,
            )

    def enter(self, slot: Tensor, ids: Tensor, position: Tensor) -> None:
        """Begin a new token in each slot."""
        angles, lanes = self._begin_token(slot, ids, position)
        x_MD = self.model.embedding(ids)
        with self._in_model():
            for layer, block in enumerate(self.model.prelude):
                x_MD = block(x_MD, angles, lanes, layer)
        self._settle(slot, ids, position, x_MD)

    def block(self, slot: Tensor, layers: Sequence[int], *, writes: bool = True) -> None:
        """One pass of the shared stack: slots at any recursions, all at these layers of it.

        writes: False if it is known that no token is at a recursion that writes keys and values.
        """
        stage, position, h_MD, memory, angles, lanes = self._begin_pass(slot, writes)
        recursion = self.recursion[stage]
        with self._in_model():
            out_MD = self.model.recursions.stack(recursion, h_MD, memory, angles, lanes, layers)
        self._end_pass(slot, stage, position, h_MD, out_MD.contiguous(), memory)
        if self.kv.shows_left:
            self._show_left(slot, stage)

    def _show_left(self, slot: Tensor, stage: Tensor) -> None:
        """Last entries of the tokens that have left, after the pass at ``stage``, before the last
        recursion that they may take."""
        stream = self.recursion[stage] + 1
        leaves = (self.stage[slot] == len(self.passes)) & (stream < self.kv.most_on_device[slot])
        if self.longest is None:
            slot, leaves = slot[leaves], leaves[leaves]
            if not len(slot):
                return
        position = self.position[slot]
        memory = {name: value[slot] for name, value in self.memory.items()}
        kv = self.kv.append_left(slot, position, leaves)
        with self._in_model():
            self.model.recursions.show(1, self.h_SD[slot], memory, self._angles(position), kv)

    def coda(self, slot: Tensor) -> Tensor:
        """States after the coda, (M, D), of tokens that took their last pass; input of the head."""
        x_MD = self.h_SD[slot]
        if self.model.coda:
            angles, lanes = self._open_own(slot, self.position[slot], new=False)
            with self._in_model():
                for layer, block in enumerate(self.model.coda, start=len(self.model.prelude)):
                    x_MD = block(x_MD, angles, lanes, layer)
        return x_MD

    def head(self, x_MD: Tensor) -> Tensor:
        """Logits, (M, V)."""
        with self._in_model():
            return self.model.predict(x_MD)

    def _open_own(self, slot: Tensor, position: Tensor, *, new: bool) -> tuple[Angles, LanePass]:
        """Of prelude and coda. new: whether the tokens have no entry yet."""
        stream = torch.zeros_like(slot)
        is_new = stream == (0 if new else 1)
        lanes = self.kv.append(slot, stream, position, is_new, kind=0, longest=self.longest)
        return self._angles(position), lanes

    def _begin_token(self, slot: Tensor, ids: Tensor, position: Tensor) -> tuple[Angles, LanePass]:
        # Numbers from the host are filled in by kernels: assigned through an index they would be
        # copied, which a CUDA graph cannot hold.
        self.ids[slot], self.position[slot] = ids, position
        self.took_SR.index_fill_(0, slot, False)
        return self._open_own(slot, position, new=True)

    def _settle(self, slot: Tensor, ids: Tensor, position: Tensor, x_MD: Tensor) -> None:
        """Tokens that took the prelude: where they go."""
        self.h_SD[slot] = x_MD
        tokens = _tokens(ids, position)
        with self._in_model():
            memory = self.model.recursions.start(self.model.router, x_MD, tokens, self.max_depth)
            if isinstance(self.router, BudgetRouter):
                memory = self.router.with_thresholds(memory, self.threshold_SR[slot])
        for name, value in memory.items():
            self.memory[name][slot] = value
        first, gate = torch.zeros_like(slot), self.gate[slot]
        self._route(slot, first, gate, x_MD, tokens, memory, entering=True)

    def _begin_pass(
        self, slot: Tensor, writes: bool
    ) -> tuple[Tensor, Tensor, Tensor, Memory, Angles, LanePass]:
        stage, position = self.stage[slot], self.position[slot]
        recursion = self.recursion[stage]
        new = ~self.took_SR[slot, recursion]
        self.took_SR[slot, recursion] = torch.ones_like(new)
        lanes = self.kv.append(
            slot, recursion + 1, position, new, kind=1, longest=self.longest, writes=writes
        )
        memory = {name: value[slot] for name, value in self.memory.items()}
        return stage, position, self.h_SD[slot], memory, self._angles(position), lanes

    def _end_pass(
        self,
        slot: Tensor,
        stage: Tensor,
        position: Tensor,
        h_MD: Tensor,
        out_MD: Tensor,
        memory: Memory,
    ) -> None:
        gate, recursion = self.gate[slot], self.recursion[stage]
        h_MD = self.model.recursions.combine(self.router, recursion, h_MD, out_MD, gate, memory)
        self.h_SD[slot] = h_MD
        tokens = _tokens(self.ids[slot], position)
        self._route(slot, stage + 1, gate, h_MD, tokens, memory, entering=False)

    def _route(
        self,
        slot: Tensor,
        stages: Tensor,
        gate: Tensor,
        h_MD: Tensor,
        tokens: PackedTokens,
        memory: Memory,
        *,
        entering: bool,
    ) -> None:
        """Move every slot on to the next pass that its token takes, or past the last one. stages:
        the passes that are next in order. entering: all are at the first; else none is."""
        end, capacities = len(self.passes), self.capacities
        for stage, (recursion, _) in list(enumerate(self.passes))[0 if entering else 1 :]:
            with self._in_model():
                decision = self.router.decide(
                    recursion, h_MD, tokens, memory, capacities[recursion]
                )
            here = stages == stage
            if decision.gate is not None:
                gate = torch.where(here, decision.gate.to(gate.dtype), gate)
            if decision.takes is not None:
                next_stage = end if self.router.is_hierarchical else stage + 1
                stages = torch.where(here & ~decision.takes, next_stage, stages)
            elif entering:
                break
        self.stage[slot], self.gate[slot] = stages, gate

    def _angles(self, position: Tensor) -> Angles:
        cos, sin = self.angles
        return cos[position], sin[position]


def compile_methods(owner: object, *names: str) -> None:
    """Compile methods, each into one graph for any number of slots."""
    for name in names:
        setattr(owner, name, compiled(getattr(owner, name), dynamic=True))


def _tokens(ids: Tensor, position: Tensor) -> PackedTokens:
    """One of each sequence."""
    every, count = torch.arange(len(ids), device=ids.device), len(ids)
    return PackedTokens(
        ids=ids,
        row=every,
        position=position,
        place=every,
        num_rows=count,
        batch_shape=(count, 1),
        per_row=1,
    )
