"""The model, one slot at a time and at any mixture of depths.

Does what ``Transformer.forward`` does to a token, cut where a token may wait for others: ``enter``
(embedding, prelude), ``block`` (one pass of the shared stack, then routing) and ``coda``, ``head``.
All state is in tensors, and shapes depend on the number of slots given alone.

A rows that hold tokens · B rows of the batch · D model · K tokens of a step · L positions · M lanes
· P passes · R recursions · S slots · T columns · V vocab
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mor.engine.kv_passes import PagedBatch
from mor.engine.paged_kv import PagedKV
from mor.model.packing import PackedTokens
from mor.model.routers import at_least_fp32
from mor.model.routing import Memory
from mor.model.transformer import Logits, Output, Transformer, passes, rotary_angles


class Runner:
    """State of the newest token of every slot. ``stage_S`` counts the passes it has behind it,
    skipped ones included.

    max_depth: caps the recursions of every token. longest: if given, attention is sized for so many
    entries and nothing is looked up on the device. ``model_s`` adds up the seconds inside the
    model's layers, router and head.
    """

    def __init__(
        self,
        model: Transformer,
        kv: PagedKV,
        *,
        max_depth: int | None = None,
        longest: int | None = None,
    ) -> None:
        config, device = model.config, model.embedding.weight.device
        self.model, self.kv, self.router, self.longest = model, kv, model.router, longest
        self.max_depth = max_depth or config.num_recursions
        self.passes = passes(config, self.max_depth)
        # One more: where a token is that took its last pass. It has no recursion of its own.
        self.recursion_P = torch.tensor(
            [*(recursion for recursion, _ in self.passes), 0], device=device
        )
        slots = kv.num_slots + 1
        self.h_SD = torch.zeros(
            slots, config.dim, dtype=model.embedding.weight.dtype, device=device
        )
        self.gate_S = at_least_fp32(self.h_SD.new_zeros(slots))
        self.id_S, self.position_S, self.stage_S = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.took_SR = torch.zeros(slots, config.num_recursions, dtype=torch.bool, device=device)
        self.angles_L = rotary_angles(
            torch.arange(kv.max_len, device=device), config.head_dim, config.rope_theta
        )
        # Started on nothing, the router shows what it will want to remember of each token.
        tokens = self._tokens(torch.arange(slots, device=device))
        with torch.no_grad():
            memory = self.router.start(self.h_SD, tokens, self.max_depth)
        self.memory_S: Memory = {name: value.clone() for name, value in memory.items()}
        self.model_s = 0.0

    @contextmanager
    def _in_model(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.model_s += time.perf_counter() - start

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
        cache = PagedBatch(self.kv, slots, starts)
        with self._in_model():
            return self.model(
                tokens_AT, mask_BT=mask_AT, cache=cache, logits=logits, max_depth=self.max_depth
            )

    def enter(self, slot_M: Tensor, id_M: Tensor, position_M: Tensor) -> None:
        """Begin a new token in each slot."""
        self.id_S[slot_M], self.position_S[slot_M], self.stage_S[slot_M] = id_M, position_M, 0
        self.took_SR[slot_M] = False
        tokens, own_M = self._tokens(slot_M), torch.zeros_like(slot_M)
        lanes = self.kv.append(slot_M, own_M, position_M, own_M == 0, kind=0, longest=self.longest)
        x_MD = self.model.embedding(id_M)
        if self.model.prelude:
            angles = self._angles(tokens)
            with self._in_model():
                for layer, block in enumerate(self.model.prelude):
                    x_MD = block(x_MD, angles, lanes, layer)
        self.h_SD[slot_M] = x_MD
        with self._in_model():
            memory = self.router.start(x_MD, tokens, self.max_depth)
        for name, value in memory.items():
            self.memory_S[name][slot_M] = value
        self._route(slot_M, x_MD, tokens, entering=True)

    def block(self, slot_M: Tensor, layers: Sequence[int]) -> None:
        """One pass of the shared stack. The slots may be at any recursions, but at these layers of
        it."""
        recursion_M = self.recursion_P[self.stage_S[slot_M]]
        tokens, new_M = self._tokens(slot_M), ~self.took_SR[slot_M, recursion_M]
        self.took_SR[slot_M, recursion_M] = True
        lanes = self.kv.append(
            slot_M, recursion_M + 1, tokens.position_M, new_M, kind=1, longest=self.longest
        )
        h_MD = self.h_SD[slot_M]
        angles = self._angles(tokens)
        with self._in_model():
            out_MD = self.model.recursions.stack(h_MD, angles, lanes, layers).contiguous()
        h_MD = self.router.combine(
            recursion_M, h_MD, out_MD, self.gate_S[slot_M], self._memory(slot_M)
        )
        self.h_SD[slot_M] = h_MD
        self.stage_S[slot_M] += 1
        self._route(slot_M, h_MD, tokens, entering=False)

    def coda(self, slot_M: Tensor) -> Tensor:
        """States after the coda of tokens that took their last pass, (M, D); the head makes logits
        of them."""
        x_MD = self.h_SD[slot_M]
        if self.model.coda:
            own_M, tokens = torch.zeros_like(slot_M), self._tokens(slot_M)
            lanes = self.kv.append(
                slot_M, own_M, tokens.position_M, own_M > 0, kind=0, longest=self.longest
            )
            angles = self._angles(tokens)
            with self._in_model():
                for layer, block in enumerate(self.model.coda, start=len(self.model.prelude)):
                    x_MD = block(x_MD, angles, lanes, layer)
        return x_MD

    def head(self, x_MD: Tensor) -> Tensor:
        """Logits, (M, V)."""
        with self._in_model():
            return self.model.predict(x_MD)

    def _route(self, slot_M: Tensor, h_MD: Tensor, tokens: PackedTokens, *, entering: bool) -> None:
        """Move every slot on to the next pass that its token takes, or past the last one. entering:
        all are at the first pass; else none is."""
        memory, end = self._memory(slot_M), len(self.passes)
        stage_M, gate_M = self.stage_S[slot_M], self.gate_S[slot_M]
        capacities = self.model.config.capacities
        for stage, (recursion, _) in list(enumerate(self.passes))[0 if entering else 1 :]:
            with self._in_model():
                decision = self.router.decide(
                    recursion, h_MD, tokens, memory, capacities[recursion]
                )
            here_M = stage_M == stage
            if decision.gate_C is not None:
                gate_M = torch.where(here_M, decision.gate_C.to(gate_M.dtype), gate_M)
            if decision.takes_C is not None:
                next_stage = end if self.router.is_hierarchical else stage + 1
                stage_M = torch.where(here_M & ~decision.takes_C, next_stage, stage_M)
            elif entering:
                break
        self.stage_S[slot_M], self.gate_S[slot_M] = stage_M, gate_M

    def _memory(self, slot_M: Tensor) -> Memory:
        return {name: value_S[slot_M] for name, value_S in self.memory_S.items()}

    def _tokens(self, slot_M: Tensor) -> PackedTokens:
        every_M = torch.arange(len(slot_M), device=slot_M.device)
        return PackedTokens(
            id_M=self.id_S[slot_M],
            row_M=every_M,
            position_M=self.position_S[slot_M],
            place_M=every_M,
            num_rows=len(slot_M),
            batch_shape=(len(slot_M), 1),
            per_row=1,
        )

    def _angles(self, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
        cos, sin = self.angles_L
        return cos[tokens.position_M], sin[tokens.position_M]
