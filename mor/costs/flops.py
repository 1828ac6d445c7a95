"""What a model costs: parameters, FLOPs and KV bytes, from its configuration alone.

FLOPs count multiplications and additions of matrix products (2 per multiply-add); norms, rotary
embedding and element-wise work are left out, as is usual. Two counts stand side by side: the
paper's (recovered from its step counts) and the exact one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import fsum
from typing import NamedTuple

from mor.model.config import ModelConfig, Trained
from mor.model.kv_cache import LEFT, READS
from mor.settings import PositiveFloat, PositiveInt, Settings, checked


def _attention_params(config: ModelConfig) -> tuple[int, int]:
    """Weights of the query and output projections, and of the key and value projections."""
    return (
        2 * config.dim * config.num_heads * config.head_dim,
        2 * config.dim * config.num_kv_heads * config.head_dim,
    )


def _block_matrix_params(config: ModelConfig) -> int:
    return sum(_attention_params(config)) + 3 * config.dim * config.ffn_dim


def _score_net_params(config: ModelConfig, outputs: int) -> int:
    if config.router.architecture == "linear":
        return config.dim * outputs
    hidden = config.dim * (1 if config.router.architecture == "mlp" else 4)
    return config.dim * hidden + hidden * outputs


def _router_nets(config: ModelConfig) -> int:
    """Networks an expert-choice router runs at each recursion."""
    return 1 if config.router.causal_selection == "aux_loss" else 2


def router_params(config: ModelConfig) -> int:
    if config.router.kind == "expert_choice":
        return config.num_recursions * _router_nets(config) * _score_net_params(config, 1)
    if config.router.kind == "gain":
        return (config.num_recursions - 1) * _gain_net_params(config)
    return (
        _score_net_params(config, config.num_recursions)
        if config.router.kind == "token_choice"
        else 0
    )


def _gain_net_params(config: ModelConfig) -> int:
    """A net that reads two states side by side."""
    D = config.dim
    hidden = {"linear": 0, "mlp": 2 * D, "wide_mlp": 8 * D}[config.router.architecture]
    return (2 * D + 1) * hidden if hidden else 2 * D


def _lora_params(config: ModelConfig) -> tuple[int, int]:
    """Of one layer's adapters, and of those for keys and values."""
    D, H, rank = config.dim, config.head_dim, config.lora_rank
    key_value = rank * 2 * (D + config.num_kv_heads * H)
    queries = rank * 2 * (D + config.num_heads * H)
    return key_value + queries + rank * 3 * (D + config.ffn_dim), key_value


def _reinjection_params(config: ModelConfig) -> int:
    return 2 * config.dim * config.dim if config.deepened else 0


def added_params(config: ModelConfig) -> int:
    """What later recursions alone have: adapters, and in a deepened model re-injection and gate."""
    gate = config.dim if config.deepened else 0
    return config.shared_layers * _lora_params(config)[0] + _reinjection_params(config) + gate


def unique_params(config: ModelConfig) -> int:
    """All parameters; shared layers and tied embeddings count once."""
    blocks = config.prelude_layers + config.shared_layers + config.coda_layers
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return (
        blocks * (_block_matrix_params(config) + 2 * config.dim)
        + config.dim
        + router_params(config)
        + added_params(config)
        + embeddings
    )


def non_embedding_params(config: ModelConfig) -> int:
    """All parameters but the embedding and an untied head."""
    return unique_params(config) - config.vocab_size * config.dim * (
        1 if config.tie_embeddings else 2
    )


def paper_flops_per_token(config: ModelConfig, context: int | None = None) -> float:
    """The paper's count of forward FLOPs: no head, no credit for GQA, causal half of attention."""
    d, b, c = config.dim, config.shared_layers, config.capacities
    linear, attention = 8 * d * d + 6 * d * config.ffn_dim, 2 * d * (context or config.max_seq_len)
    own = (config.prelude_layers + config.coda_layers) * (linear + attention)
    if config.kv_strategy == "recursion_wise":
        return own + b * (linear * sum(c) + attention * sum(x * x for x in c))
    unwritten = 4 * d * d * (sum(c) - 1) if config.kv_strategy == "shared" else 0
    return own + b * (linear * sum(c) - unwritten + attention * sum(c))


def kept_per_recursion(
    config: ModelConfig, length: int, capacities: Sequence[float] | None = None
) -> list[int]:
    """Tokens of a sequence that top-k selection keeps at each recursion."""
    return [max(1, int(c * length)) for c in capacities or config.capacities]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a forward really processes: counts that determine its FLOPs.

    tokens and kept (one per recursion) are tokens; pairs are (query, key) pairs of attention, per
    layer; logits is how many tokens the head sees.
    """

    tokens: int
    kept: Sequence[int]
    own_pairs: float
    pairs: Sequence[float]
    logits: int


def sequence_workload(
    config: ModelConfig, length: int, *, capacities: Sequence[float] | None = None
) -> Workload:
    """A training sequence. Attention is causal: a query meets the keys at or before it."""
    kept = kept_per_recursion(config, length, capacities)
    own_pairs = length * (length + 1) / 2
    if config.kv_strategy == "recursion_wise":
        pairs = [k * (k + 1) / 2 for k in kept]
    else:  # all tokens' keys, on average half of them before a query
        pairs = [k * (length + 1) / 2 for k in kept]
    return Workload(tokens=length, kept=kept, own_pairs=own_pairs, pairs=pairs, logits=length)


def forward_flops(config: ModelConfig, work: Workload) -> float:
    """Exact FLOPs of a forward over ``work``, with GQA, routers and head."""
    return fsum(part.products + part.attention for part in _parts(config, work))


class _Part(NamedTuple):
    """FLOPs of a part of the forward. trained_with: the least that has to be trained for its
    weights to be. reads_added, reads_block: whether what such weights made flows through it."""

    products: float
    attention: float
    trained_with: Trained
    reads_added: bool
    reads_block: bool


def _parts(config: ModelConfig, work: Workload) -> Iterator[_Part]:
    key_value = _attention_params(config)[1]
    block, per_pair = _block_matrix_params(config), 4 * config.num_heads * config.head_dim
    reads, own, own_attention = (
        READS[config.kv_strategy],
        2 * block * work.tokens,
        per_pair * work.own_pairs,
    )
    first, last = config.prelude_layers, config.coda_layers
    yield _Part(first * own, first * own_attention, "all", False, False)
    for r, (kept, pairs) in enumerate(zip(work.kept, work.pairs, strict=True), start=1):
        weights = block if r in reads(r) else block - key_value
        products, attention = 2 * weights * kept, per_pair * pairs
        S, reads_added = config.shared_layers, r > 1 or _is_adapted(config, r)
        yield _Part(S * products, S * attention, "block", reads_added, True)
        yield _Part(2 * _added_weights(config, r) * kept, 0, "added", True, True)
        if LEFT in reads(r + 1) and r < len(work.kept):  # entries of those that leave now
            left = kept - work.kept[r]
            yield _Part(S * 2 * key_value * left, 0, "block", True, True)
            yield _Part(2 * _added_to_left(config) * left, 0, "added", True, True)
    yield _Part(last * own, last * own_attention, "all", True, True)
    yield _Part(2 * config.dim * config.vocab_size * work.logits, 0, "all", True, True)
    yield _Part(_router_flops(config, work), 0, "added", True, True)


def backward_flops(config: ModelConfig, work: Workload, trained: Trained) -> float:
    """Of a backward pass that makes gradients of the trained weights, and of whatever lies between
    them and the loss. Products cost once again for each of the two, attention twice. Where not all
    is trained this is a little too much: the first weights that are need no gradient of what they
    read."""
    return _backward_flops(_parts(config, work), trained)


def _backward_flops(parts: Iterable[_Part], trained: Trained) -> float:
    order = ("added", "block", "all")
    total = 0.0
    for part in parts:
        is_trained = order.index(part.trained_with) <= order.index(trained)
        passes_on = {"added": part.reads_added, "block": part.reads_block, "all": True}[trained]
        total += (is_trained + passes_on) * part.products + 2 * passes_on * part.attention
    return total


def _added_weights(config: ModelConfig, recursion: int) -> int:
    """Of adapters and re-injection, those that a pass of this recursion (from 1) applies."""
    adapters, key_value = _lora_params(config) if _is_adapted(config, recursion) else (0, 0)
    if recursion not in READS[config.kv_strategy](recursion):
        adapters -= key_value
    reinjection = _reinjection_params(config) if recursion > 1 else 0
    return config.shared_layers * adapters + reinjection


def _is_adapted(config: ModelConfig, recursion: int) -> bool:
    return config.lora_rank > 0 and recursion >= config.lora_from


def _added_to_left(config: ModelConfig) -> int:
    """Of these, the ones that make entries of a token that left."""
    return config.shared_layers * _lora_params(config)[1] + _reinjection_params(config)


def _router_flops(config: ModelConfig, work: Workload) -> float:
    if config.router.kind == "token_choice":
        return 2 * _score_net_params(config, config.num_recursions) * work.tokens
    if config.router.kind == "gain":
        return 2 * _gain_net_params(config) * sum(work.kept[:-1])
    if config.router.kind != "expert_choice":
        return 0
    candidates = (
        [work.tokens, *work.kept[:-1]]
        if config.router.hierarchical
        else [work.tokens] * len(work.kept)
    )
    return 2 * _router_nets(config) * _score_net_params(config, 1) * sum(candidates)


def train_flops(
    config: ModelConfig,
    length: int,
    *,
    capacities: Sequence[float] | None = None,
    trained: Trained = "all",
) -> float:
    """Forward and backward of one training sequence: three forwards, or less if not all weights
    are trained."""
    work = sequence_workload(config, length, capacities=capacities)
    return forward_flops(config, work) + backward_flops(config, work, trained)


def measuring_flops(config: ModelConfig, length: int, *, source_is_known: bool = False) -> float:
    """What a router that learns from gains adds to a training sequence: a forward for each depth
    that tokens might have stopped at. source_is_known: none for depth 1."""
    if config.router.kind != "gain":
        return 0
    work = sequence_workload(config, length)
    return fsum(
        forward_flops(config, replace(work, kept=work.kept[:depth], pairs=work.pairs[:depth]))
        for depth in range(2 if source_is_known else 1, config.num_recursions)
    )


def train_exit_flops(
    config: ModelConfig, length: int, num_recursions: int, *, trained: Trained = "all"
) -> float:
    """Forward and backward of a sequence's exits: coda and head after each recursion but the last,
    and the head once more there."""
    block, per_pair = _block_matrix_params(config), 4 * config.num_heads * config.head_dim
    layers = (num_recursions - 1) * config.coda_layers
    products, attention = 2 * block * length, per_pair * length * (length + 1) / 2
    head = 2 * config.dim * config.vocab_size * length
    parts = (
        _Part(layers * products, layers * attention, "all", True, True),
        _Part(num_recursions * head, 0, "all", True, True),
    )
    forward = fsum(part.products + part.attention for part in parts)
    return forward + _backward_flops(parts, trained)


def kv_entry_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Key and value of one token in one layer."""
    return 2 * config.num_kv_heads * config.head_dim * dtype_bytes


def kv_bytes(config: ModelConfig, tokens: int, kept: Sequence[float], dtype_bytes: int) -> float:
    """Cache of ``tokens`` tokens of which ``kept[r]`` took recursion r."""
    reads = READS[config.kv_strategy]
    written = fsum(k for r, k in enumerate(kept, start=1) if r in reads(r))
    if LEFT in reads(2):
        written += kept[0] - kept[-1]
    layers_x_tokens = (
        config.prelude_layers + config.coda_layers
    ) * tokens + config.shared_layers * written
    return layers_x_tokens * kv_entry_bytes(config, dtype_bytes)


class Machine(Settings):
    """The limits of a machine, per second: FLOPs of matrix products, bytes to or from memory."""

    flops_per_s: PositiveFloat
    bytes_per_s: PositiveFloat

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Roofline: the slower of the two, as if they overlapped perfectly."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


def decode_seconds(
    config: ModelConfig,
    machine: Machine,
    *,
    batch: int,
    context: float,
    shares: Sequence[float] | None = None,
    dtype_bytes: int = 2,
) -> float:
    """Least time to decode one token when ``batch`` tokens share each pass: of the shared layers at
    any mixture of depths, of the rest (prelude, coda, head) once per token. Weights, keys and
    values are read, new ones written.

    context: tokens before it. shares: of tokens at each recursion, the capacities if None.
    """
    shares = config.capacities if shares is None else shares
    reads, recursive = READS[config.kv_strategy], config.kv_strategy == "recursion_wise"
    entry, per_pair = kv_entry_bytes(config, dtype_bytes), 4 * config.num_heads * config.head_dim
    block, key_value = _block_matrix_params(config), _attention_params(config)[1]
    own_layers = config.prelude_layers + config.coda_layers
    head = config.dim * config.vocab_size

    weights = own_layers * block + head
    flops = 2 * weights + own_layers * per_pair * context
    num_bytes = dtype_bytes * weights / batch + own_layers * entry * (context + 1)
    seconds = machine.seconds(flops, num_bytes)
    for r, share in enumerate(shares, start=1):
        seen = context * share if recursive else context
        weights = block if r in reads(r) else block - key_value
        added = _added_weights(config, r)
        flops = config.shared_layers * (2 * weights + per_pair * seen) + 2 * added
        num_bytes = config.shared_layers * (
            dtype_bytes * block / batch + entry * (seen + (r in reads(r)))
        )
        num_bytes += dtype_bytes * added / batch
        seconds += share * machine.seconds(flops, num_bytes)
        if LEFT in reads(r + 1) and r < len(shares):  # entries of those that leave now
            flops = config.shared_layers * 2 * key_value
            num_bytes = config.shared_layers * (dtype_bytes * key_value / batch + entry)
            seconds += (share - shares[r]) * machine.seconds(flops, num_bytes)
    return seconds


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs at a context length, with the configured capacities as shares of tokens."""

    family: str
    layout: str
    num_layers: int
    context: int
    params: int
    params_non_embedding: int
    paper_mflops_per_token: float
    forward_flops_per_token: float
    train_flops_per_token: float
    kv_dtype_bytes: int
    kv_bytes_per_token: float
    mean_depth: float


@checked
def costs(
    config: ModelConfig, *, context: PositiveInt | None = None, kv_dtype_bytes: PositiveInt = 2
) -> Costs:
    """All costs of a model. context: sequence length, the configured maximum if None."""
    length = context or config.max_seq_len
    forward = forward_flops(config, sequence_workload(config, length)) / length
    return Costs(
        family=config.family,
        layout=config.layout_name,
        num_layers=config.num_layers,
        context=length,
        params=unique_params(config),
        params_non_embedding=non_embedding_params(config),
        paper_mflops_per_token=paper_flops_per_token(config, length) / 1e6,
        forward_flops_per_token=forward,
        train_flops_per_token=3 * forward,
        kv_dtype_bytes=kv_dtype_bytes,
        kv_bytes_per_token=kv_bytes(config, 1, config.capacities, kv_dtype_bytes),
        mean_depth=fsum(config.capacities),
    )
