"""The model, one slot at a time and at any mixture of depths.

Does what ``Transformer.forward`` does to a token, cut where a token may wait for others: ``enter``
(embedding, prelude), ``block`` (one pass of the shared stack, then routing) and ``coda`` (coda, head).

S slots · M lanes · D model · R recursions · V vocab
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mor.engine.paged_kv import LanePass, PagedBatch, PagedKV
from mor.model import Output, Transformer, rotary_angles
from mor.packing import PackedTokens
from mor.routing import Routing, RoutingStep, at_least_fp32


class Runner:
    """State of the newest token of every slot. ``stage_S`` counts the passes it has behind it.

    max_depth: caps the recursions of every token. ``model_s`` adds up the seconds inside the model's layers and head.
    """

    def __init__(self, model: Transformer, kv: PagedKV, *, max_depth: int | None = None) -> None:
        config = model.config
        self.model, self.kv, self.router = model, kv, model.recursions.router
        self.max_depth = max_depth or config.num_recursions
        self.passes = [p for p in model.recursions.passes if p[0] < self.max_depth]
        self.recursion_of = np.array([recursion for recursion, _ in self.passes])
        num_slots = len(kv.count)
        weight = model.embedding.weight
        self.h_SD = torch.zeros(num_slots, config.dim, dtype=weight.dtype, device=weight.device)
        scores = at_least_fp32(self.h_SD.new_zeros(num_slots, config.num_recursions))
        self.first_SD = torch.zeros_like(self.h_SD)
        self.gate_S, self.logit_SR, self.score_SR = scores[:, 0].clone(), scores, scores.clone()
        self.choice_S = torch.zeros(num_slots, dtype=torch.int64, device=weight.device)
        self.id_S, self.position_S, self.stage_S = (np.zeros(num_slots, dtype=np.int64) for _ in range(3))
        self.took_SR = np.zeros((num_slots, config.num_recursions), dtype=bool)
        self.model_s = 0.0

    @contextmanager
    def _in_model(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.model_s += time.perf_counter() - start

    def read(self, slots: Sequence[int], ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Output:
        """Several tokens of each slot in an ordinary forward; logits of each one's last token, (A, 1, V)."""
        width, device = max(map(len, ids)), self.h_SD.device
        tokens_AT = torch.tensor([[*i, *[0] * (width - len(i))] for i in ids], device=device)
        mask_AT = torch.arange(width, device=device) < torch.tensor([[len(i)] for i in ids], device=device)
        cache = PagedBatch(self.kv, slots, starts)
        with self._in_model():
            return self.model(tokens_AT, mask_BT=mask_AT, cache=cache, last_only=True, max_depth=self.max_depth)

    def enter(self, slot_M: np.ndarray, id_M: Sequence[int], position_M: Sequence[int]) -> None:
        """Begin a new token in each slot."""
        self.id_S[slot_M], self.position_S[slot_M], self.stage_S[slot_M] = id_M, position_M, 0
        self.took_SR[slot_M] = False
        stream_M = np.zeros(len(slot_M), dtype=np.int64)
        self.kv.append(slot_M, stream_M, self.position_S[slot_M])
        tokens, index_M = self._tokens(slot_M), self._on_device(slot_M)
        x_MD = self.model.embedding(tokens.id_M)
        if self.model.prelude:
            lanes, angles = LanePass(self.kv, slot_M, stream_M), self._angles(tokens)
            with self._in_model():
                for layer, block in enumerate(self.model.prelude):
                    x_MD = block(x_MD, angles, lanes, layer)
        self.h_SD[index_M] = self.first_SD[index_M] = x_MD
        routing = self._routing(tokens)
        self.router.start(x_MD, routing)
        if routing.choice_M is not None and routing.logit_MR is not None and routing.score_MR is not None:
            self.choice_S[index_M] = routing.choice_M
            self.logit_SR[index_M], self.score_SR[index_M] = routing.logit_MR, routing.score_MR
        self._route(slot_M)

    def block(self, slot_M: np.ndarray) -> None:
        """One pass of the shared stack. The slots may be at any recursions, but at the same layers of it."""
        recursion_M = self.recursion_of[self.stage_S[slot_M]]
        first = ~self.took_SR[slot_M, recursion_M]
        self.kv.append(slot_M[first], recursion_M[first] + 1, self.position_S[slot_M[first]])
        self.took_SR[slot_M, recursion_M] = True
        tokens, index_M = self._tokens(slot_M), self._on_device(slot_M)
        h_MD = self.h_SD[index_M]
        layers = self.layers(slot_M[0])
        lanes = LanePass(self.kv, slot_M, recursion_M + 1)
        angles = self._angles(tokens)
        with self._in_model():
            out_MD = self.model.recursions.stack(h_MD, angles, lanes, layers).contiguous()
        for recursion in np.unique(recursion_M):
            here = self._on_device(np.flatnonzero(recursion_M == recursion))
            at, group = index_M[here], tokens.select(here)
            step = RoutingStep(int(recursion), group, gate_K=self.gate_S[at])
            self.h_SD[at] = self.router.combine(
                step, h_MD[here], out_MD[here], self.first_SD[at], self._routing(group, at)
            )
        self.stage_S[slot_M] += 1
        self._route(slot_M)

    def coda(self, slot_M: np.ndarray) -> Tensor:
        """States after the coda of tokens that took their last pass, (M, D); the head makes logits of them."""
        tokens = self._tokens(slot_M)
        x_MD = self.h_SD[self._on_device(slot_M)]
        if self.model.coda:
            lanes, angles = LanePass(self.kv, slot_M, np.zeros_like(slot_M)), self._angles(tokens)
            with self._in_model():
                for layer, block in enumerate(self.model.coda, start=len(self.model.prelude)):
                    x_MD = block(x_MD, angles, lanes, layer)
        return x_MD

    def head(self, x_MD: Tensor) -> Tensor:
        """Logits, (M, V)."""
        with self._in_model():
            return self.model.predict(x_MD)

    def layers(self, slot: int) -> list[int]:
        """The shared layers that a slot's next pass applies."""
        return self.passes[self.stage_S[slot]][1]

    def exited(self, slot: int) -> bool:
        """Whether the slot's token took its last pass."""
        return bool(self.stage_S[slot] == len(self.passes))

    def next_streams(self, slot_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The (slot, stream) pairs that get a new entry in the slots' next pass."""
        recursion_M = self.recursion_of[self.stage_S[slot_M]]
        first = ~self.took_SR[slot_M, recursion_M]
        return slot_M[first], recursion_M[first] + 1

    def _route(self, slot_M: np.ndarray) -> None:
        """Move every slot on to the next pass that its token takes, or past the last one."""
        end = len(self.passes)
        while len(slot_M := slot_M[self.stage_S[slot_M] < end]):
            undecided = []
            recursion_M = self.recursion_of[self.stage_S[slot_M]]
            for recursion in np.unique(recursion_M):
                group_K = slot_M[recursion_M == recursion]
                tokens, at = self._tokens(group_K), self._on_device(group_K)
                step = self.router.select(int(recursion), self.h_SD[at], self._routing(tokens, at))
                if step.gate_K is not None:
                    self.gate_S[at if step.index_K is None else at[step.index_K]] = step.gate_K.to(self.gate_S.dtype)
                if step.index_K is None:
                    continue
                rejected = np.ones(len(group_K), dtype=bool)
                rejected[step.index_K.cpu().numpy()] = False
                undecided.append(group_K[rejected])
            if not undecided:
                return
            slot_M = np.concatenate(undecided)
            self.stage_S[slot_M] = end if self.model.config.router.hierarchical else self.stage_S[slot_M] + 1

    def _routing(self, tokens: PackedTokens, at: Tensor | None = None) -> Routing:
        """A record in which these tokens are all there are: each is a candidate."""
        routing = Routing(tokens, "threshold", self.model.config.capacities, self.max_depth)
        if at is not None:
            routing.choice_M, routing.logit_MR, routing.score_MR = (
                self.choice_S[at], self.logit_SR[at], self.score_SR[at]
            )  # fmt: skip
        return routing

    def _tokens(self, slot_M: np.ndarray) -> PackedTokens:
        every_M = torch.arange(len(slot_M), device=self.h_SD.device)
        return PackedTokens(
            id_M=self._on_device(self.id_S[slot_M]),
            row_M=every_M,
            position_M=self._on_device(self.position_S[slot_M]),
            place_M=every_M,
            num_rows=len(slot_M),
            batch_shape=(len(slot_M), 1),
            per_row=1,
        )

    def _angles(self, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
        return rotary_angles(tokens.position_M, self.model.config.head_dim, self.model.config.rope_theta)

    def _on_device(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.h_SD.device)
