"""What one rank needs in training: weights, moments, gradients and activations, from the
configuration alone.

Counted are the tensors that the step keeps. Left out: the allocator's fragments, cuDNN and NCCL
workspaces, and the CUDA context, so leave a margin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mor.costs.flops import kept_per_recursion, unique_params
from mor.model.config import ModelConfig
from mor.model.kv_cache import READS
from mor.model.loss import CHUNK_LOGITS
from mor.settings import PositiveInt, Settings

MASTER_BYTES = 4  # weights, gradients and each of AdamW's two moments are fp32


@dataclass(frozen=True, kw_only=True)
class TrainMemory:
    """Bytes on one rank. peak: the largest sum at one moment, either when the backward pass begins
    (activations) or when it ends (gradients)."""

    weights: int
    moments: int
    gradients: int
    activations: int
    head: int
    """Chunk of logits, and the gradients that the loss makes in the forward pass."""
    peak: int


class Step(Settings):
    """A step on one of ``ranks``. batch_size: sequences per forward. fused_norms: as on a GPU."""

    batch_size: PositiveInt
    seq_len: PositiveInt
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: bool = False
    ranks: PositiveInt = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    fused_norms: bool = True

    @property
    def product_bytes(self) -> int:
        return 2 if self.precision == "bfloat16" else 4


def train_memory(config: ModelConfig, run: Step) -> TrainMemory:
    """Memory of a training step with top-k selection (or as many tokens at each depth). Raises
    ValueError for a model with adapters, which are not counted."""
    if config.deepened or config.lora_rank:
        raise ValueError(
            "the memory of training is not counted for a model with adapters; leave out "
            "--train.batch-size"
        )
    params = MASTER_BYTES * unique_params(config)
    several, share = run.ranks > 1, run.ranks if run.parallel == "fsdp" else 1
    # FSDP: during a step also the gathered parameters
    gathered = params if several and run.parallel == "fsdp" else 0
    # DDP: gradient buckets stay allocated all the time
    buckets = params if several and run.parallel == "ddp" else 0
    # Autocast's copies of the weights.
    copies = unique_params(config) * 2 if run.precision == "bfloat16" else 0
    weights = gradients = params // share + gathered
    moments = 2 * params // share
    activations = activation_bytes(config, run) + copies
    head = head_bytes(config, run.batch_size * run.seq_len)
    at_worst = max(buckets + activations + head, gradients + copies)
    return TrainMemory(
        weights=weights,
        moments=moments,
        gradients=gradients,
        activations=activations,
        head=head,
        peak=weights + moments + at_worst,
    )


def head_bytes(config: ModelConfig, tokens: int) -> int:
    """The loss: fp32 logits of a chunk twice over, and the gradients of the hidden states and of
    the head's weight."""
    chunk = min(tokens, max(1, CHUNK_LOGITS // config.vocab_size)) * config.vocab_size
    return MASTER_BYTES * (2 * chunk + tokens * config.dim + config.vocab_size * config.dim)


def activation_bytes(config: ModelConfig, run: Step) -> int:
    """What the model keeps for the backward pass; with ``recompute`` the inputs of the layers, and
    one layer whole."""
    kept = kept_per_recursion(config, run.seq_len)
    own_layers = config.prelude_layers + config.coda_layers
    state = MASTER_BYTES * config.dim  # the residual stream is fp32
    passes = [(own_layers, run.seq_len, layer_bytes(config, run, with_kv=True))]
    masks = 0
    for recursion, tokens in enumerate(kept, start=1):
        reads = READS[config.kv_strategy](recursion)
        passes.append(
            (config.shared_layers, tokens, layer_bytes(config, run, with_kv=recursion in reads))
        )
        if reads != (recursion,):  # a bias for each pass, the same for all its layers
            masks += tokens * run.seq_len * run.product_bytes
    if run.recompute:
        inside = sum(layers * tokens * state for layers, tokens, _ in passes) + max(
            t * each for n, t, each in passes if n
        )
    else:
        inside = sum(layers * tokens * each for layers, tokens, each in passes)
    return run.batch_size * (
        inside + masks + routing_bytes(config, kept, run.seq_len) + run.seq_len * state
    )


def layer_bytes(config: ModelConfig, run: Step, *, with_kv: bool) -> int:
    """What one layer keeps per token: what enters and leaves its parts, and the feed-forward."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    products = 2 * config.dim + 2 * heads + (2 * kv_heads if with_kv else 0) + 4 * config.ffn_dim
    # Unfused norms also keep what they scale by their weights.
    norms = (2 if run.fused_norms else 4) * config.dim
    return MASTER_BYTES * (norms + config.num_heads) + run.product_bytes * products


def routing_bytes(config: ModelConfig, kept: list[int], seq_len: int) -> int:
    """What routing keeps: the states that routers scored, and the outputs that gates scaled."""
    if config.family != "mor":
        return 0
    scored = {"expert_choice": [seq_len, *kept[:-1]], "token_choice": [seq_len]}.get(
        config.router.kind, []
    )
    return MASTER_BYTES * config.dim * sum((*scored, *kept))
