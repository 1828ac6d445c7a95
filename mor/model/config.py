"""Model configuration: one frozen description for vanilla, recursive and MoR models.

A model is ``prelude -> shared layers, applied num_recursions times -> coda``. Vanilla is
``num_recursions=1``, the Recursive Transformer is ``router.kind="fixed"``, the rest is MoR.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from mor.settings import (
    Listed,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Settings,
    Share,
    UnitInterval,
    checked,
    suggestion,
)

RouterKind = Literal[
    "fixed", "expert_choice", "token_choice", "gain", "random", "position", "frequency"
]
KVStrategyName = Literal["recursion_wise", "shared", "hybrid", "final"]
Sharing = Literal["cycle", "sequence", "middle_cycle", "middle_sequence"]
Selection = Literal["topk", "threshold"]
Recipe = Literal["recommended", "elastic", "paper"]
Trained = Literal["added", "block", "all"]
"""Parts of a model: what later recursions have of their own with the router, the shared layers too,
or everything."""

# No model has as many layers or recursions; a damaged file may ask for them, and memory would end.
_MOST = 10_000

# How transformers calls our settings.
TRANSFORMERS_NAMES = {
    "hidden_size": "dim",
    "intermediate_size": "ffn_dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "num_hidden_layers": "num_layers",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}

# Options that only some routers read. Setting one for another router is a warning, not silence.
_UNLEARNT: tuple[RouterKind, ...] = ("random", "position", "frequency")
_READ_BY: dict[str, tuple[RouterKind, ...]] = {
    "architecture": ("expert_choice", "token_choice", "gain"),
    "score": ("expert_choice", "token_choice"),
    "alpha": ("expert_choice", "token_choice", *_UNLEARNT),
    "gate": ("expert_choice", "token_choice", *_UNLEARNT),
    "capacities": ("expert_choice", *_UNLEARNT),
    "hierarchical": ("expert_choice",),
    "causal_selection": ("expert_choice",),
    "selection_weight": ("expert_choice",),
    "gain_weight": ("expert_choice", "gain"),
    "z_loss_weight": ("expert_choice", "token_choice"),
    "balancing": ("token_choice",),
    "balancing_weight": ("token_choice",),
    "bias_update_rate": ("token_choice",),
    "combination": ("token_choice",),
    "reads": ("expert_choice", "token_choice"),
    "seed": ("random",),
    "explore": ("gain",),
}
# And options that only some values of another one read.
_READ_WITH: dict[str, tuple[RouterKind, str, tuple[str, ...]]] = {
    "balancing_weight": ("token_choice", "balancing", ("loss",)),
    "bias_update_rate": ("token_choice", "balancing", ("loss_free",)),
    "selection_weight": ("expert_choice", "causal_selection", ("aux_loss", "aux_router")),
    "gain_weight": ("expert_choice", "causal_selection", ("gain",)),
}


class NoEffect(UserWarning):
    """A setting that was changed and that nothing reads beside the others."""


class RouterConfig(Settings, prefix="router"):
    """How a token's recursion depth is decided. ``None``: the paper's choice for this router."""

    kind: RouterKind = "fixed"
    """fixed: every token takes every recursion; expert_choice: each recursion picks its tokens;
    token_choice: each token picks its depth once; gain: a token goes on where that is predicted to
    lower its loss, in training too, which measures it with tokens that stop earlier (with gates and
    top-k: expert_choice with causal_selection gain); random: the control; position and frequency:
    baselines whose depth follows from the position, or from how rare the token is."""
    architecture: Literal["linear", "mlp", "wide_mlp"] = "linear"
    reads: Literal["state", "direction"] = "state"
    """What the router's network sees of a token. state: its state as it is (paper); direction: the
    state at length one, so that a step of AdamW moves a logit by about lr * sqrt(dim) at most,
    however large states get. Where logits move further, gates shut before anything is learned."""
    score: Literal["sigmoid", "tanh", "none", "softmax"] | None = None
    """Function applied to router logits. Paper: sigmoid (expert-choice), softmax (token-choice)."""
    alpha: PositiveFloat | None = None
    """Scale of the gate. Paper: 1 for token-choice, 0.1 for the others, our baselines included."""
    gate: Literal["paper", "residual"] = "paper"
    """paper: h + g * Stack(h); residual: h + g * (Stack(h) - h)."""
    capacities: Listed[tuple[Share, ...]] | None = None
    """Share of the sequence kept at each recursion. Paper: 1, (R-1)/R, ..., 1/R."""
    hierarchical: bool = True
    """Only tokens selected at one recursion compete for the next."""
    causal_selection: Literal["aux_loss", "aux_router", "gain"] = "aux_loss"
    """What selects tokens causally. aux_loss: the router's own logits, which learn to imitate
    top-k; aux_router: a second network that does; gain: a second network that learns what going on
    gains, from exits in steps in which all tokens take all recursions, and that top-k compares
    tokens by as well (without top-k and such steps: kind gain)."""
    selection_weight: NonNegativeFloat = 0.001
    """Weight of the binary cross-entropy against top-k membership."""
    gain_weight: NonNegativeFloat = 0.1
    """Weight of the binary cross-entropy against gains: of kind gain, and of causal_selection
    gain."""
    z_loss_weight: NonNegativeFloat = 0.0
    balancing: Literal["loss", "loss_free", "none"] = "loss"
    balancing_weight: NonNegativeFloat = 0.1
    bias_update_rate: NonNegativeFloat = 0.001
    """Step of the loss-free balancing bias, per optimizer step."""
    combination: Literal["last", "every"] = "last"
    """last: only the last pass is gated (public code); every: all passes are (paper's equation)."""
    seed: Seed = 0
    explore: UnitInterval = 0.2
    """Share of tokens that training sends on whatever the router says, so that their gain is
    known."""

    def __post_init__(self) -> None:
        for name, reason in self.without_effect():
            if self._changed(name):
                warnings.warn(f"router.{name} has no effect {reason}", NoEffect, stacklevel=4)
        if self.kind == "expert_choice" and self.score == "softmax":
            raise ValueError(
                "router.score='softmax' compares depths and needs router.kind='token_choice'; "
                "expert-choice takes 'sigmoid', 'tanh' or 'none'"
            )
        if self.kind == "token_choice" and self.score in ("tanh", "none"):
            raise ValueError(
                f"router.score={self.score!r} gives no probabilities; token-choice takes 'softmax' "
                "or 'sigmoid'"
            )
        if self.kind == "token_choice" and self.combination == "every" and self.gate == "residual":
            raise ValueError(
                "router.combination='every' adds h_1 at the last pass and has no residual form; "
                "use router.gate='paper' or router.combination='last'"
            )

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Names of settings that nothing reads, whatever their value, and why."""
        for name, kinds in _READ_BY.items():
            if self.kind not in kinds:
                yield name, f"with router.kind={self.kind!r}"
        for name, (kind, other, values) in _READ_WITH.items():
            if self.kind == kind and getattr(self, other) not in values:
                yield name, f"with router.{other}={getattr(self, other)!r}"

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != self.__dataclass_fields__[name].default)

    @property
    def score_name(self) -> str:
        """The score function in force."""
        return self.score or ("softmax" if self.kind == "token_choice" else "sigmoid")

    @property
    def gate_scale(self) -> float:
        """The alpha in force."""
        return (
            self.alpha if self.alpha is not None else (1.0 if self.kind == "token_choice" else 0.1)
        )


class ModelConfig(Settings):
    """Shape of a model. Validated when made; :func:`preset` and :func:`layout` help to make one."""

    vocab_size: PositiveInt = 49_152
    dim: PositiveInt = 576
    num_heads: PositiveInt = 9
    num_kv_heads: PositiveInt = 3
    head_dim: PositiveInt = 64
    ffn_dim: PositiveInt = 1536
    prelude_layers: Annotated[int, Field(ge=0, le=_MOST)] = 0
    """Layers before the recursions, applied once."""
    shared_layers: Annotated[int, Field(ge=1, le=_MOST)] = 30
    """Layers in the shared stack, stored once and applied num_recursions times."""
    coda_layers: Annotated[int, Field(ge=0, le=_MOST)] = 0
    """Layers after the recursions, applied once."""
    num_recursions: Annotated[int, Field(ge=1, le=_MOST)] = 1
    shared_order: Literal["cycle", "sequence"] = "cycle"
    """cycle: (0,1,2)(0,1,2); sequence: (0,0)(1,1)(2,2)."""
    kv_strategy: KVStrategyName = "recursion_wise"
    """What a recursion sees of tokens that left before it. recursion_wise: nothing; shared: every
    token's entries of the first recursion, and no other; hybrid: those of tokens that left, and new
    ones of the others; final: entries made from the state that they left with, and new ones of the
    others."""
    router: RouterConfig = field(default_factory=RouterConfig)
    deepened: bool = False
    """Later recursions look back at what came out of the prelude and end with a gate of their own.
    Both are zero at first: a deepened model starts as the model that it was made of."""
    lora_rank: NonNegativeInt = 0
    """Rank of adapters in the shared layers; 0: none."""
    lora_from: Literal[1, 2] = 2
    """The recursion from which adapters act. 2: the first one stays as it is without them; 1: they
    act in all, as in a model that is applied once."""
    lora_alpha: PositiveFloat | None = None
    """Adapters count lora_alpha / lora_rank. None: 2 * lora_rank."""
    max_seq_len: PositiveInt = 2048
    rope_theta: PositiveFloat = 10_000.0
    norm_eps: NonNegativeFloat = 1e-5
    tie_embeddings: bool = True
    init_std: NonNegativeFloat = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        self._check_routing()

    def _check_routing(self) -> None:
        kind, given = self.router.kind, self.router.capacities
        if kind != "fixed" and self.num_recursions == 1:
            raise ValueError(
                f"router.kind={kind!r} needs num_recursions >= 2: with one recursion there is "
                "nothing to route; use router.kind='fixed' for a plain model"
            )
        if kind != "fixed" and self.shared_order == "sequence":
            raise ValueError(
                f"router.kind={kind!r} needs shared_order='cycle': in 'sequence' a layer repeats "
                "before the next one starts, so there is no pass of the whole stack to skip"
            )
        if given is not None and kind in _READ_BY["capacities"]:
            if len(given) != self.num_recursions:
                raise ValueError(
                    f"router.capacities has {len(given)} entries for "
                    f"num_recursions={self.num_recursions}"
                )
            nested = kind in _UNLEARNT or self.router.hierarchical
            if nested and list(given) != sorted(given, reverse=True):
                raise ValueError(
                    f"router.capacities={given} must not grow with depth when tokens drop out for "
                    "good; sort them or set router.hierarchical=False"
                )
        if self.lora_rank > max(self.dim, self.ffn_dim):
            raise ValueError(
                f"lora_rank={self.lora_rank} is larger than any matrix that it could adapt; take "
                f"one below dim={self.dim}"
            )
        later_only = self.deepened or (self.lora_rank and self.lora_from > 1)
        if later_only and self.num_recursions == 1:
            raise ValueError(
                "deepened=True and lora_rank act at recursions after the first and need "
                "num_recursions >= 2, or for lora_rank alone lora_from=1"
            )
        if self.deepened and (self.shared_order == "sequence" or self.capacities[0] < 1):
            raise ValueError(
                "deepened=True keeps the first recursion as it is in the source: it needs "
                "shared_order='cycle' and a first capacity of 1"
            )
        if self.kv_strategy == "final" and kind == "expert_choice" and not self.router.hierarchical:
            raise ValueError(
                "kv_strategy='final' shows tokens by the state that they left with, so that none "
                "may come back; use router.hierarchical=True or another kv_strategy"
            )
        if self.kv_strategy != "recursion_wise" and self.capacities[0] < 1:
            raise ValueError(
                f"kv_strategy={self.kv_strategy!r} reads the first recursion's keys of every "
                f"token; the first capacity must be 1, got {self.capacities[0]}"
            )
        for name, reason in self._without_effect():
            group, _, setting = name.rpartition(".")
            owner: Any = getattr(self, group) if group else self
            if (value := getattr(owner, setting)) != owner.__dataclass_fields__[setting].default:
                warnings.warn(f"{name}={value!r} has no effect {reason}", NoEffect, stacklevel=5)

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Dotted names of settings that nothing reads, whatever their value, and why."""
        yield from self._without_effect()
        yield from ((f"router.{name}", reason) for name, reason in self.router.without_effect())

    def _without_effect(self) -> Iterator[tuple[str, str]]:
        if self.num_recursions == 1:
            yield "kv_strategy", "with one recursion"
            yield "shared_order", "with one recursion"
        elif self.kv_strategy in ("hybrid", "final") and self.router.kind == "fixed":
            yield "kv_strategy", "with router.kind='fixed', where no token leaves"
        if not self.lora_rank:
            yield "lora_alpha", "without lora_rank"
            yield "lora_from", "without lora_rank"
        if self.deepened:
            own = ("gate", "combination", *(["alpha"] if self.router.kind in _UNLEARNT else []))
            for name in own:
                yield f"router.{name}", "with deepened=True, which has a gate of its own"

    @property
    def num_layers(self) -> int:
        """Effective depth: layers that a token passes when it takes every recursion."""
        return self.prelude_layers + self.shared_layers * self.num_recursions + self.coda_layers

    @property
    def layout_name(self) -> str:
        """prelude + shared x recursions + coda, such as 1+10x3+1."""
        shared = f"{self.shared_layers}x{self.num_recursions}"
        return f"{self.prelude_layers}+{shared}+{self.coda_layers}"

    @property
    def capacities(self) -> tuple[float, ...]:
        """Expected share of tokens at each recursion (all ones for ``fixed``)."""
        R = self.num_recursions
        if self.router.kind == "fixed":
            return (1.0,) * R
        return self.router.capacities or tuple((R - r) / R for r in range(R))

    @property
    def least_depth(self) -> int:
        """Recursions that a token takes at least: 0 where the first one leaves tokens out."""
        return int(self.capacities[0] == 1)

    @property
    def lora_scale(self) -> float:
        """What the product of an adapter is multiplied by."""
        return (self.lora_alpha or 2 * self.lora_rank) / max(1, self.lora_rank)

    @property
    def family(self) -> Literal["vanilla", "recursive", "mor"]:
        if self.num_recursions == 1:
            return "vanilla"
        return "recursive" if self.router.kind == "fixed" else "mor"

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    def with_capacities(self, capacities: Sequence[float]) -> ModelConfig:
        """The same model with other capacities, which must fit as configured ones must."""
        try:
            each = tuple(capacities)
        except TypeError:
            raise ValueError(
                f"capacities must be a share for each recursion, got {capacities!r}"
            ) from None
        return self.replace(router=dataclasses.replace(self.router, capacities=each))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def among(cls, values: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """The settings in a file or call that also has others, and those others.

        Ours may have the names that transformers gives them. Raises ValueError for one that is
        given twice or misspelt.
        """
        ours: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for given, value in values.items():
            name = TRANSFORMERS_NAMES.get(given, given)
            if name in ours and ours[name] != value:
                raise ValueError(
                    f"{name} is given twice, as {ours[name]!r} and as {given}={value!r}"
                )
            (ours if name in cls.__dataclass_fields__ else others)[name] = value
        for name in others:
            if close := difflib.get_close_matches(name, cls.__dataclass_fields__, 1, cutoff=0.8):
                raise ValueError(f"{name!r} is not a setting (did you mean {close[0]!r}?)")
        return cls.from_dict(ours), others


@checked
def layout(
    num_layers: PositiveInt, num_recursions: PositiveInt, sharing: Sharing = "middle_cycle"
) -> dict[str, Any]:
    """Layer counts of a sharing scheme (paper, section 2) as ModelConfig settings.

    Raises ValueError naming the nearest valid depths if ``num_layers`` does not divide.
    """
    own = 1 if sharing.startswith("middle") and num_recursions > 1 else 0
    shared, rest = divmod(num_layers - 2 * own, num_recursions)
    if rest or shared < 1:
        below = 2 * own + shared * num_recursions
        least = 2 * own + num_recursions
        near = [depth for depth in (below, below + num_recursions) if depth >= least] or [least]
        nearest = " or ".join(map(str, near))
        raise ValueError(
            f"num_layers={num_layers} does not fit {num_recursions} recursions with "
            f"sharing={sharing!r}; nearest valid: {nearest}"
        )
    order = "sequence" if sharing.endswith("sequence") and num_recursions > 1 else "cycle"
    return dict(
        prelude_layers=own,
        shared_layers=shared,
        coda_layers=own,
        num_recursions=num_recursions,
        shared_order=order,
    )


# Name: (layers, settings). SmolLM shapes of the paper's section 3; tiny ones for tests, laptops.
_PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "smollm-135m": (30, dict(dim=576, num_heads=9, num_kv_heads=3, ffn_dim=1536)),
    "smollm-360m": (32, dict(dim=960, num_heads=15, num_kv_heads=5, ffn_dim=2560)),
    "smollm-730m": (26, dict(dim=1536, num_heads=24, num_kv_heads=8, ffn_dim=4096)),
    "smollm-1.7b": (24, dict(dim=2048, num_heads=32, num_kv_heads=32, ffn_dim=8192)),
    "tiny": (
        8,
        dict(
            dim=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            ffn_dim=176,
            vocab_size=512,
            max_seq_len=256,
        ),
    ),
    "mini": (
        8,
        dict(
            dim=192,
            num_heads=6,
            num_kv_heads=2,
            head_dim=32,
            ffn_dim=512,
            vocab_size=2048,
            max_seq_len=512,
        ),
    ),
    "small": (
        14,
        dict(dim=384, num_heads=6, num_kv_heads=2, ffn_dim=1024, vocab_size=8192, max_seq_len=1024),
    ),
}
PRESET_NAMES = tuple(_PRESETS)


@checked
def preset(
    name: str,
    *,
    num_recursions: PositiveInt = 1,
    recipe: Recipe = "recommended",
    router: RouterKind | RouterConfig | None = None,
    kv_strategy: KVStrategyName | None = None,
    sharing: Sharing = "middle_cycle",
    num_layers: PositiveInt | None = None,
    **overrides: Any,
) -> ModelConfig:
    """A named model shape with the layout for ``num_recursions``.

    recipe: what is not given. ``recommended`` is what our studies favour: with several recursions
    expert-choice, ``hybrid`` keys and values, the residual gate with alpha 1. ``elastic`` is for
    many depths of inference: keys and values ``final``, who goes on decided by predicted gains,
    from the direction of states;
    it is trained with :func:`mor.training.config.training_of`. ``paper`` is arXiv 2507.10524:
    expert-choice, ``recursion_wise``, its gate with alpha 0.1.
    router: a kind takes its gate from the recipe; a RouterConfig is taken as it is, and then keys
    and values are ``recursion_wise`` unless given. ``fixed`` makes a Recursive Transformer.
    num_layers: without it the preset's depth is rounded up to the next one that the sharing scheme
    allows, which gives the paper's layouts (360M: 1+15+1, 1+10+1, 1+8+1 for 2, 3, 4 recursions).
    One that is given must fit exactly.
    """
    if name not in _PRESETS:
        raise ValueError(
            f"preset {name!r} is not known{suggestion(name, _PRESETS)}; choose from "
            f"{', '.join(_PRESETS)}"
        )
    depth, shape = _PRESETS[name]
    if num_layers is None:
        own = 2 if sharing.startswith("middle") else 0
        passes = -(-(depth - own) // num_recursions)
        num_layers = depth if num_recursions == 1 else own + passes * num_recursions
    if router is None:
        router = "expert_choice" if num_recursions > 1 else "fixed"
    if isinstance(router, str):
        kv_strategy = kv_strategy or kv_strategy_of(router, recipe)
        router = RouterConfig(kind=router, **router_settings_of(router, recipe))
    made = shape | layout(num_layers, num_recursions, sharing) | {"router": router}
    made["kv_strategy"] = kv_strategy or "recursion_wise"
    return ModelConfig(**(made | overrides))


def router_settings_of(kind: RouterKind, recipe: Recipe) -> dict[str, Any]:
    """The recipe's settings of a router. Token-choice keeps the paper's gate in every recipe: no
    study of ours says otherwise."""
    if recipe == "paper" or kind in ("fixed", "token_choice"):
        return {}
    by_gain = recipe == "elastic" and kind == "expert_choice"
    own = {"causal_selection": "gain", "reads": "direction"} if by_gain else {}
    return {"gate": "residual", "alpha": 1.0} | own


def kv_strategy_of(kind: RouterKind, recipe: Recipe) -> KVStrategyName:
    """The recipe's keys and values. Entries of tokens that left matter only where tokens leave."""
    if recipe == "paper" or kind == "fixed":
        return "recursion_wise"
    return "final" if recipe == "elastic" else "hybrid"
