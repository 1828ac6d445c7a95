"""The model, top to bottom: vanilla, recursive and Mixture-of-Recursions are one network.

    embed -> prelude -> [ route -> gather -> shared blocks -> gate and scatter ] x R -> coda -> head

Tokens are packed (see packing.py): M counts the tokens that really take part.

B rows · T columns · M packed tokens · K selected · D model · N heads · G key/value heads · H head
dim · F feed-forward · V vocab · A rows that hold tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mor.model.checks import check_inputs, check_max_depth
from mor.model.compiling import compiled
from mor.model.config import ModelConfig, Selection
from mor.model.kv_cache import LEFT, READS, AttentionPass, Cache, KVStore, check_fits
from mor.model.loss import CHUNK_LOGITS, IGNORED, linear_cross_entropies
from mor.model.packing import PackedTokens, pack, take
from mor.model.routers import Router, build_router
from mor.model.routing import Exits, Memory, Routing, RoutingRule, RoutingStep, route
from mor.model.scratch import Scratch

if TYPE_CHECKING:
    from mor.model.budget import DepthTable

Logits = Literal["all", "last", "none"]
Angles = tuple[Tensor, Tensor]
"""Cosines and sines of rotary embedding."""
Later = Tensor | Literal[True]
"""Who is at a recursion after the first: all, or those of a pass's tokens, (K, 1). Functions take
it as their last argument, or none at the first recursion."""


@dataclass(frozen=True)
class Output:
    """logits_BTV: zeros at padding; with ``logits="last"`` (B, 1, V), the last token of each row.
    With targets there are none, and ``nll`` is the mean negative log-likelihood of the targets, in
    nats; nll_each that of each packed token, without gradients."""

    logits_BTV: Tensor
    routing: Routing
    nll: Tensor | None = None
    nll_each: Tensor | None = None


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_MD: Tensor) -> Tensor:
        weight = self.weight.to(x_MD.dtype)  # gathered from shards it may be shorter
        return F.rms_norm(x_MD, self.weight.shape, weight, self.eps)


def rotary_angles(position: Tensor, head_dim: int, theta: float) -> Angles:
    """Cosines and sines for rotary embedding, each (M, 1, H/2), fp32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position.device) / head_dim
    angle_M1H = position[:, None, None].float() * (1.0 / theta**exponent)
    return angle_M1H.cos(), angle_M1H.sin()


def rotate(x_MNH: Tensor, angles: Angles) -> Tensor:
    """Rotate dimension pairs (i, i + H/2)."""
    cos, sin = (a.to(x_MNH.dtype) for a in angles)
    a, b = x_MNH.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def only_later(later: Later, change_KD: Tensor) -> Tensor:
    """A change of later rows alone: added to the others, it leaves them as they are."""
    return change_KD.where(later, 0) if isinstance(later, Tensor) else change_KD


class Added(nn.Module):
    """A matrix that later recursions add to a source, zero at the start unless it is drawn. No
    ``nn.Linear``: what looks for linear layers to change (PEFT, quantizers) leaves it alone."""

    def __init__(self, inputs: int, outputs: int, *, drawn: bool = False) -> None:
        super().__init__()
        self.drawn, self.weight = drawn, nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, x_MD: Tensor) -> Tensor:
        return F.linear(x_MD, self.weight)


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter (LoRA), as a rule for later recursions alone: merged into the
    weight it would change the first one, too."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.lora_A = Added(inputs, rank, drawn=True)
        self.lora_B = Added(rank, outputs)
        self.scale = scale

    def forward(self, x_MD: Tensor, *later: Later) -> Tensor:
        return self.adapt(F.linear(x_MD, self.weight), x_MD, *later)

    def adapt(self, out_MN: Tensor, x_MD: Tensor, *later: Later) -> Tensor:
        """Add the adapter's part, where that acts, to what the layer gives for x. In place: an
        engine's products have a layout of their own, which what follows is computed by."""
        for where in later:
            out_MN += only_later(where, self.scale * self.lora_B(self.lora_A(x_MD)))
        return out_MN

    def merged(self) -> nn.Linear:
        """The layer as it is where the adapter acts, without one."""
        outputs, inputs = self.weight.shape
        made = nn.Linear(inputs, outputs, bias=False).to(self.weight)
        added = self.scale * self.lora_B.weight.float() @ self.lora_A.weight.float()
        made.weight.data.copy_(self.weight.float() + added)
        return made


def linear(config: ModelConfig, inputs: int, outputs: int, adapted: bool) -> nn.Linear:
    if adapted and config.lora_rank:
        return AdaptedLinear(inputs, outputs, config.lora_rank, config.lora_scale)
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, adapted: bool = False) -> None:
        super().__init__()
        self.head_dim, D = config.head_dim, config.dim
        heads, kv_heads = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = linear(config, D, heads, adapted)
        self.k_proj = linear(config, D, kv_heads, adapted)
        self.v_proj = linear(config, D, kv_heads, adapted)
        self.o_proj = linear(config, heads, D, adapted)

    def project(
        self, x_MD: Tensor, angles: Angles, with_kv: bool, *later: Later
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Queries (M, N, H), and keys and values (M, G, H) if the pass writes any."""
        q_MNH = rotate(self.q_proj(x_MD, *later).unflatten(-1, (-1, self.head_dim)), angles)
        return (q_MNH, *self.keys_values(x_MD, angles, *later)) if with_kv else (q_MNH, None, None)

    def keys_values(self, x_MD: Tensor, angles: Angles, *later: Later) -> tuple[Tensor, Tensor]:
        """(M, G, H) each."""
        k_MGH = rotate(self.k_proj(x_MD, *later).unflatten(-1, (-1, self.head_dim)), angles)
        return k_MGH, self.v_proj(x_MD, *later).unflatten(-1, (-1, self.head_dim))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig, adapted: bool = False) -> None:
        super().__init__()
        self.gate_proj = linear(config, config.dim, config.ffn_dim, adapted)
        self.up_proj = linear(config, config.dim, config.ffn_dim, adapted)
        self.down_proj = linear(config, config.ffn_dim, config.dim, adapted)

    def forward(self, x_MD: Tensor, *later: Later) -> Tensor:
        hidden_MF = F.silu(self.gate_proj(x_MD, *later)) * self.up_proj(x_MD, *later)
        out_MD: Tensor = self.down_proj(hidden_MF, *later)
        return out_MD


class Block(nn.Module):
    """adapted: with the adapters of the settings, if there are any."""

    PARTS = ("enter", "leave")  # what stands before and after attention

    def __init__(self, config: ModelConfig, adapted: bool = False) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, adapted)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config, adapted)

    def forward(
        self, x_MD: Tensor, angles: Angles, kv: AttentionPass, layer: int, *later: Later
    ) -> Tensor:
        q_MNH, k_MGH, v_MGH = self.enter(x_MD, angles, kv.writes, *later)
        if k_MGH is not None and v_MGH is not None:
            kv.write(layer, k_MGH, v_MGH)
        return self.leave(x_MD, kv.attend(layer, q_MNH), *later)

    def enter(
        self, x_MD: Tensor, angles: Angles, with_kv: bool, *later: Later
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Everything before the attention kernel."""
        return self.attention.project(self.attention_norm(x_MD), angles, with_kv, *later)

    def leave(self, x_MD: Tensor, mixed_MNH: Tensor, *later: Later) -> Tensor:
        """Everything after it."""
        x_MD = x_MD + self.attention.o_proj(mixed_MNH.flatten(-2), *later)
        out_MD: Tensor = x_MD + self.feed_forward(self.feed_forward_norm(x_MD), *later)
        return out_MD

    def show(
        self, x_MD: Tensor, angles: Angles, kv: AttentionPass, layer: int, *later: Later
    ) -> None:
        """Let others see these states, which the layer is not applied to."""
        kv.write(layer, *self.attention.keys_values(self.attention_norm(x_MD), angles, *later))

    def __getstate__(self) -> dict[str, Any]:
        """Without what :meth:`compile_parts` made: it belongs to this block's weights, so a copy or
        a pickle is to be compiled anew."""
        return {name: value for name, value in self.__dict__.items() if name not in self.PARTS}

    def compile_parts(self, **settings: Any) -> None:
        """Compile what stands before and after attention, each into one graph for any number of
        tokens.

        Attention is one kernel already, and what surrounds it knows neither rows nor caches: so no
        shape, layer or recursion asks for a compilation of its own. settings: as ``torch.compile``
        takes them.
        """
        for name in self.PARTS:
            setattr(self, name, compiled(getattr(self, name), dynamic=True, **settings))

    def as_written(self) -> None:
        """Without what :meth:`compile_parts` made."""
        for name in self.PARTS:
            self.__dict__.pop(name, None)


def checkpointed(function: Callable[..., Tensor], *args: object, recompute: bool) -> Tensor:
    """``function(*args)``; with ``recompute`` the backward pass makes its activations again."""
    return checkpoint(function, *args, use_reentrant=False) if recompute else function(*args)


def passes(config: ModelConfig, num_recursions: int | None = None) -> list[tuple[int, list[int]]]:
    """(recursion, shared layers that it applies), in order. None: for the trained recursions."""
    layers, recursions = range(config.shared_layers), range(num_recursions or config.num_recursions)
    return {
        "cycle": [(r, list(layers)) for r in recursions],
        "sequence": [(r, [layer]) for layer in layers for r in recursions],
    }[config.shared_order]


class Deepening(nn.Module):
    """How later recursions begin and end in a deepened model: with a look back at what came out of
    the prelude, and with a step towards the stack's output.

        u = h + B [norm(h); norm(entered)]        h <- h + 10 * gate * (stack(u) - h)

    B and the gate, which has a number for each dimension, start at zero: later recursions change
    nothing until they are trained. Where the router has a gate too, both count, so that a score is
    learned from what its recursion was worth. Optimizers such as AdamW move a number by about the
    learning rate in a step, and the way from 0 to 1 is long: so the gate counts tenfold.
    """

    GATE_SCALE = 10.0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.reinject = Added(2 * config.dim, config.dim)
        self.gate = nn.Parameter(torch.zeros(config.dim))

    def begin(self, h_KD: Tensor, entered_KD: Tensor, later: Later) -> Tensor:
        both = (F.rms_norm(x, x.shape[-1:], eps=self.eps) for x in (h_KD, entered_KD))
        return h_KD + only_later(later, self.reinject(torch.cat([*both], dim=-1)))

    def end(self, h_KD: Tensor, out_KD: Tensor, routed: Tensor | None, later: Later) -> Tensor:
        """routed: the router's gate of each token, (K,), if it has one."""
        gate, change_KD = self.gate.to(h_KD.dtype), out_KD - h_KD
        # A shut gate lets nothing through, not even what float16 cannot hold.
        change_KD = torch.where(gate == 0, change_KD.nan_to_num(), change_KD)
        step_KD = self.GATE_SCALE * gate * change_KD
        if routed is not None:
            step_KD = routed[:, None].to(h_KD.dtype) * step_KD
        stepped_KD = h_KD + step_KD
        return torch.where(later, stepped_KD, out_KD) if isinstance(later, Tensor) else stepped_KD


class Recursions(nn.Module):
    """The shared blocks and the loop over them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.shared_blocks = nn.ModuleList(
            Block(config, adapted=True) for _ in range(config.shared_layers)
        )
        self.deepening = Deepening(config) if config.deepened else None
        self.router = build_router(config)

    def start(self, router: Router, x_MD: Tensor, tokens: PackedTokens, max_depth: int) -> Memory:
        """What is to be remembered of each token from before the first recursion."""
        memory = router.start(x_MD, tokens, max_depth)
        return memory if self.deepening is None else memory | {"entered": x_MD}

    def stack(
        self,
        recursion: int | Tensor,
        x_KD: Tensor,
        memory: Memory,
        angles: Angles,
        kv: AttentionPass,
        layers: Sequence[int],
        recompute: bool = False,
    ) -> Tensor:
        """One pass of these layers. recursion: one number, or (K,) where tokens at different
        recursions share the pass."""
        x_KD, adapting = self._begin(recursion, x_KD, memory)
        for layer in layers:
            x_KD = checkpointed(
                self.shared_blocks[layer], x_KD, angles, kv, layer, *adapting, recompute=recompute
            )
        return x_KD

    def _begin(
        self, recursion: int | Tensor, x_KD: Tensor, memory: Memory
    ) -> tuple[Tensor, tuple[Later, ...]]:
        """What the first layer reads, and what tells layers whom their adapters act on."""
        later = _later(recursion)
        if self.deepening is not None and later:
            x_KD = self.deepening.begin(x_KD, memory["entered"], *later)
        if not self.config.lora_rank:
            return x_KD, ()
        return x_KD, (True,) if self.config.lora_from == 1 else later

    def combine(
        self,
        router: Router,
        recursion: int | Tensor,
        h_KD: Tensor,
        out_KD: Tensor,
        gate: Tensor | None,
        memory: Memory,
    ) -> Tensor:
        """New states after a pass: gated as the router says, in a deepened model by its own too."""
        if self.deepening is None:
            return router.combine(recursion, h_KD, out_KD, gate, memory)
        later = _later(recursion)
        return self.deepening.end(h_KD, out_KD, gate, *later) if later else out_KD

    def forward(
        self,
        x_MD: Tensor,
        angles: Angles,
        tokens: PackedTokens,
        store: KVStore,
        rule: RoutingRule,
        *,
        router: Router | None = None,
        recompute: bool = False,
        keep_states: bool = False,
    ) -> tuple[Tensor, Routing]:
        router, reads = router or self.router, READS[self.config.kv_strategy]
        if LEFT in reads(2) and router.may_return:
            raise ValueError(
                f"kv_strategy={self.config.kv_strategy!r} shows tokens by the state that they left "
                "with; a token that skips a recursion must not take a later one"
            )
        memory = self.start(router, x_MD, tokens, rule.max_depth)
        steps: list[RoutingStep] = []
        states, passes_kv = [x_MD], dict[int, AttentionPass]()
        for recursion, layers in passes(self.config, rule.max_depth):
            # Route: who goes in? In "sequence" order a recursion has several passes, decided once.
            if recursion == len(steps):
                steps.append(route(router, recursion, x_MD, tokens, memory, steps, rule))
                if LEFT in reads(recursion + 1):
                    self._show_left(steps, x_MD, angles, tokens, memory, store)
            step = steps[recursion]
            if recursion == 0 and len(step.tokens) < len(tokens):
                self._check_first()
            if len(step.tokens):
                if recursion not in passes_kv:
                    stream = recursion + 1
                    passes_kv[recursion] = store.open(stream, reads(stream), step.tokens)
                # Gather them, apply the shared blocks to them alone, gate the output, scatter it.
                here = step.gather(angles[0]), step.gather(angles[1])
                h_KD, own_memory = step.gather(x_MD), {n: step.gather(m) for n, m in memory.items()}

                kv = passes_kv[recursion]
                out_KD = self.stack(recursion, h_KD, own_memory, here, kv, layers, recompute)

                new_KD = self.combine(router, recursion, h_KD, out_KD, step.gate, own_memory)
                x_MD = step.scatter(new_KD, x_MD)
            if keep_states:
                states.append(x_MD)
        return x_MD, Routing(tokens, rule, memory, steps, states if keep_states else ())

    def _show_left(
        self,
        steps: Sequence[RoutingStep],
        x_MD: Tensor,
        angles: Angles,
        tokens: PackedTokens,
        memory: Memory,
        store: KVStore,
    ) -> None:
        """Entries of the tokens that took the recursion before the last step, and not its own: as
        if their state began it."""
        before, now = steps[-2:]
        count = len(before.tokens) - len(now.tokens)  # known without waiting for the device
        if count:
            has_left = before.taken(tokens) & ~now.taken(tokens)
            left = has_left.int().argsort(descending=True, stable=True)[:count]
            kv = store.open(LEFT, (LEFT,), tokens.select(left))
            here = take(angles[0], left), take(angles[1], left)
            own_memory = {name: take(value, left) for name, value in memory.items()}
            self.show(now.recursion, take(x_MD, left), own_memory, here, kv)

    def show(
        self, recursion: int, x_KD: Tensor, memory: Memory, angles: Angles, kv: AttentionPass
    ) -> None:
        """Let others see these states as if they began a recursion, which they do not take."""
        x_KD, adapting = self._begin(recursion, x_KD, memory)
        for layer, block in enumerate(self.shared_blocks):
            block.show(x_KD, angles, kv, layer, *adapting)  # type: ignore[operator]

    def _check_first(self) -> None:
        if self.config.kv_strategy != "recursion_wise":
            raise ValueError(
                f"kv_strategy={self.config.kv_strategy!r} reads the first recursion's keys of "
                "every token, so every token must take it; use a router or capacities that keep "
                "all tokens there, or kv_strategy='recursion_wise'"
            )


def _later(recursion: int | Tensor) -> tuple[Later, ...]:
    if isinstance(recursion, Tensor):
        return ((recursion > 0)[:, None],)
    return (True,) if recursion > 0 else ()


class Transformer(nn.Module):
    """A causal language model for any :class:`ModelConfig`. Holds each shared layer once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.depth_table: DepthTable | None = None  # what depth budgets ask of the router's scores
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.prelude_layers))
        self.recursions = Recursions(config)
        self.coda = nn.ModuleList(Block(config) for _ in range(config.coda_layers))
        self.final_norm = RMSNorm(config.dim, config.norm_eps)
        self.head = (
            None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        )

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        mask_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
        cache: Cache | None = None,
        selection: Selection = "threshold",
        capacities: Sequence[float] | None = None,
        max_depth: int | None = None,
        router: Router | None = None,
        logits: Logits = "all",
        recompute: bool = False,
        keep_states: bool = False,
        entered_BTD: Tensor | None = None,
        exit_rows: int = 0,
    ) -> Output:
        """Logits for the next token at every position, and the routing that led there.

        tokens_BT: int64 ids. mask_BT: true or 1 at real tokens; padding may be on either side.
        documents_BT: a number per token; tokens of different documents neither attend to nor
        compete with each other, and positions start anew (training and evaluation without a cache).
        targets_BT: next tokens, -100 where there is none; gives ``nll`` instead of logits, in less
        memory.
        cache: keys and values of earlier tokens; the new ones are appended.
        selection: ``threshold`` is causal; ``topk`` is the paper's training selection and sees the
        future.
        capacities: replaces the configured ones (warm-up); they must fit as those must.
        max_depth: caps the recursions.
        router: decides in place of the model's own, such as one of :mod:`mor.model.other_depths`,
        or that of a depth budget (:func:`mor.model.budget.router_for`).
        logits: of ``all`` tokens, the ``last`` of each row, or ``none``.
        recompute: keep no activations inside the layers; backward makes them again.
        keep_states: put the states before the first pass and after each one into the record.
        entered_BTD: the states that leave the prelude, where they are known; it is skipped then.
        exit_rows: of that many rows, the first ones, also note what tokens would predict after each
        recursion (:class:`mor.model.routing.Exits`); with targets and where all tokens take all
        recursions.
        Raises ValueError for an empty batch, ids and targets outside the vocabulary, a mask that is
        not made of truth values, capacities that the settings would refuse, a depth or a cache that
        does not fit, and top-k with a cache. On a CUDA device ids and targets are checked there, by
        an assertion.
        """
        check_inputs(
            self.config,
            tokens_BT,
            mask_BT=mask_BT,
            documents_BT=documents_BT,
            targets_BT=targets_BT,
            cache=cache,
            selection=selection,
            logits=logits,
            entered_BTD=entered_BTD,
        )
        if cache is not None:
            check_fits(cache, self.config, len(tokens_BT), self.embedding.weight)
        start = None if cache is None else cache.length
        tokens = pack(tokens_BT, mask_BT, start=start, documents_BT=documents_BT)
        if not len(tokens):
            raise ValueError("the mask hides every token of the batch")
        router = router or self.router
        rule = self._rule(router, selection, capacities, max_depth)
        store: KVStore = cache or Scratch(
            kept=() if self.config.kv_strategy == "recursion_wise" else (LEFT, 1)
        )
        angles = rotary_angles(tokens.position, self.config.head_dim, self.config.rope_theta)

        everyone = store.open(0, (0,), tokens)
        if entered_BTD is None:
            x_MD = self._embed(tokens.ids)
            for layer, block in enumerate(self.prelude):
                x_MD = checkpointed(block, x_MD, angles, everyone, layer, recompute=recompute)
        else:
            x_MD = entered_BTD.flatten(0, 1)[tokens.place]
        x_MD, routing = self.recursions(
            x_MD,
            angles,
            tokens,
            store,
            rule,
            router=router,
            recompute=recompute,
            keep_states=keep_states or exit_rows > 0,
        )
        for layer, block in enumerate(self.coda, start=len(self.prelude)):
            x_MD = checkpointed(block, x_MD, angles, everyone, layer, recompute=recompute)
        if exit_rows:
            routing = self._with_exits(routing, x_MD, angles, targets_BT, exit_rows)
        routing = replace(routing, losses=router.losses(routing))
        if targets_BT is not None:
            target = targets_BT.flatten()[tokens.place]
            nll, nll_each = linear_cross_entropies(self.final_norm(x_MD), self.head_weight, target)
            return Output(x_MD.new_empty(0), routing, nll, nll_each)
        if logits == "none":
            return Output(x_MD.new_empty(0), routing)
        return Output(self._logits(x_MD, tokens, logits), routing)

    def _with_exits(
        self,
        routing: Routing,
        x_MD: Tensor,
        angles: Angles,
        targets_BT: Tensor | None,
        rows: int,
    ) -> Routing:
        """x: states after the coda."""
        tokens, R = routing.tokens, len(routing.steps)
        if targets_BT is None or len(routing.states) != R + 1 or min(routing.rule.capacities) < 1:
            raise ValueError(
                "exits need targets, shared_order='cycle', and capacities of 1: every token is to "
                "be predicted after every recursion"
            )
        most = tokens.batch_shape[1] * rows
        first = tokens.select((tokens.place < most).nonzero().squeeze(1))
        target = targets_BT.flatten()[first.place]
        asked = (target != IGNORED).nonzero().squeeze(1)
        here = angles[0][: len(first)], angles[1][: len(first)]
        ends = []
        for state_MD in routing.states[1:-1]:
            h_KD, own = state_MD[: len(first)], Scratch(kept=()).open(0, (0,), first)
            for layer, block in enumerate(self.coda, start=len(self.prelude)):
                h_KD = block(h_KD, here, own, layer)
            ends.append(h_KD)
        nll = [self._nll_of_each(h[asked], target[asked]) for h in (*ends, x_MD[: len(first)])]
        return replace(routing, exits=Exits(asked, torch.stack(nll)))

    def _nll_of_each(self, x_KD: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihoods in fp32, (K,); logits are dropped and made again."""

        def of(x: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(self.predict(x).float(), target, reduction="none")

        rows = max(1, CHUNK_LOGITS // self.config.vocab_size)
        parts = zip(x_KD.split(rows), target.split(rows), strict=True)
        return torch.cat([checkpointed(of, *part, recompute=True) for part in parts])

    if TYPE_CHECKING:  # nn.Module's own __call__ returns Any

        def __call__(self, tokens_BT: Tensor, **settings: Any) -> Output: ...

    def compile_blocks(self, **settings: Any) -> Transformer:
        """Compile all layers (see :meth:`Block.compile_parts`)."""
        for block in self.blocks():
            block.compile_parts(**settings)
        return self

    def as_written(self) -> Transformer:
        """Without what :meth:`compile_blocks` made."""
        for block in self.blocks():
            block.as_written()
        return self

    @property
    def is_compiled(self) -> bool:
        return all(part in vars(block) for block in self.blocks() for part in block.PARTS)

    def blocks(self) -> list[Block]:
        """All layers, each once."""
        return [*self.prelude, *self.recursions.shared_blocks, *self.coda]

    @property
    def router(self) -> Router:
        """The router that the model was trained with."""
        return self.recursions.router

    @property
    def head_weight(self) -> Tensor:
        """(V, D). Of a tied head what the embedding gives for every token: where an adapter stands
        around the embedding, the head changes with it."""
        if self.head is not None:
            return self.head.weight
        embedding: nn.Module = self.embedding
        if isinstance(embedding, nn.Embedding):
            return embedding.weight
        every_token = torch.arange(self.config.vocab_size, device=self.embedding.weight.device)
        weight_VD: Tensor = embedding(every_token)
        return weight_VD

    def _embed(self, ids: Tensor) -> Tensor:
        try:
            x_MD: Tensor = self.embedding(ids)
        except IndexError:
            low, high, most = int(ids.min()), int(ids.max()), self.config.vocab_size - 1
            if low >= 0 and high <= most:  # a hook of the embedding, not the ids
                raise
            raise ValueError(
                f"token ids must lie in 0..{most}, got ids from {low} to {high}"
            ) from None
        return x_MD

    def _rule(
        self,
        router: Router,
        selection: Selection,
        capacities: Sequence[float] | None,
        max_depth: int | None,
    ) -> RoutingRule:
        trained, R = self.config.num_recursions, router.num_recursions
        check_max_depth(max_depth, R)
        expected = self.config.capacities
        if capacities is not None and capacities != expected:
            expected = self.config.with_capacities(capacities).capacities
        further = expected[-1:] * (R - trained)  # beyond the trained ones, as the last
        return RoutingRule(selection, (*expected, *further), max_depth or R)

    def predict(self, x_MD: Tensor) -> Tensor:
        """Final norm and head: logits, (M, V)."""
        x_MD = self.final_norm(x_MD)
        return F.linear(x_MD, self.head_weight) if self.head is None else self.head(x_MD)

    def _logits(self, x_MD: Tensor, tokens: PackedTokens, logits: Logits) -> Tensor:
        if logits == "all":
            return tokens.unpack(self.predict(x_MD))
        logits_AV = self.predict(x_MD[tokens.last_index()])
        if tokens.rows is None:
            return logits_AV[:, None]
        return logits_AV.new_zeros(tokens.num_rows, 1, logits_AV.shape[-1]).index_copy(
            0, tokens.rows, logits_AV[:, None]
        )

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> Transformer:
        """Normal(0, init_std) for matrices, ones for norms, zeros for what a deepened model adds to
        its source. Raises if a parameter is missed."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        missed = {name for name, _ in self.named_parameters()}
        for prefix, module in self.named_modules():
            if isinstance(module, Added) and not module.drawn:
                module.weight.zero_()
            elif isinstance(module, Deepening):
                module.gate.zero_()
                missed.discard(f"{prefix}.gate")
                continue
            elif isinstance(module, nn.Linear | nn.Embedding | Added):
                draw = torch.randn(module.weight.shape, generator=generator) * self.config.init_std
                module.weight.copy_(draw)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            else:
                continue
            missed.discard(f"{prefix}.weight")
        if missed:
            raise RuntimeError(f"init_weights has no rule for {sorted(missed)}")
        return self
