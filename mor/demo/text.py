"""The demo on text: three families of equal effective depth, and MoR's layers in one pass.

B rows of the batch · T columns
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mor.analysis.depth_text import depth_legend, depth_text
from mor.costs import flops as costs
from mor.data.config import DataConfig
from mor.data.corpus import Corpus
from mor.data.stream import Windows
from mor.demo.experiment import ROUTED, Experiment, Trained
from mor.evaluation.nll import evaluate
from mor.generation import SamplingParams, generate
from mor.model.config import preset
from mor.model.kv_cache import KVCache
from mor.model.transformer import Transformer

SHAPE: dict[str, Any] = dict(
    dim=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=176, max_seq_len=256, init_std=0.08
)
NAMES = ("vanilla", "recursive", "MoR", "one pass")
LAYERS = 8
# Bits per byte. Another order of the data has moved the difference by that much (LOG.md).
CLEAR = 0.06
LEAST_DEPTH = 1.1  # below, MoR does not use its recursions


def text_experiment(flops: float, *, quick: bool) -> Experiment:
    """quick: bytes instead of a BPE, small batches, little validation text."""
    models = (
        preset("tiny", num_layers=LAYERS, **SHAPE),
        preset("tiny", num_layers=LAYERS, num_recursions=3, router="fixed", **SHAPE),
        preset("tiny", num_layers=LAYERS, num_recursions=3, **ROUTED, **SHAPE),
        preset("tiny", num_layers=LAYERS - 4, **SHAPE),
    )
    return Experiment(
        name="text",
        data=DataConfig(
            tokenizer="bytes" if quick else "bpe",
            vocab_size=None if quick else 1024,
            validation_share=0.08,
        ),
        models=dict(zip(NAMES, models, strict=True)),
        # Tuned for each model on this budget (LOG.md).
        lr=dict(zip(NAMES, (4e-3, 8e-3, 8e-3, 1.6e-2), strict=True)),
        flops=flops,
        seq_len=128,
        batch_size=2 if quick else 8,
        eval_windows=4 if quick else 48,
    )


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """One trained model. wall_s: training alone. kv_bytes_per_token: measured on an fp32 cache."""

    name: str
    params_non_embedding: int
    effective_layers: int
    train_flops: float
    tokens: int
    wall_s: float
    bits_per_byte_causal: float
    bits_per_byte_topk: float | None
    mean_depth: float
    kv_bytes_per_token: float
    lr: float
    checkpoint: str


def text_row(
    name: str, trained: Trained, data: Windows, seq_len: int, max_windows: int | None
) -> TextRow:
    """Numbers on up to ``max_windows`` windows of the validation text; None: all of it."""
    model = trained.model
    causal = evaluate(model, data, seq_len=seq_len, max_windows=max_windows)
    assert causal.bits_per_byte is not None
    topk = None
    if model.router.has_topk:
        topk = evaluate(
            model, data, seq_len=seq_len, max_windows=max_windows, selection="topk"
        ).bits_per_byte
    return TextRow(
        name=name,
        params_non_embedding=costs.non_embedding_params(model.config),
        effective_layers=model.config.num_layers,
        train_flops=trained.flops,
        tokens=trained.tokens,
        wall_s=trained.wall_s,
        bits_per_byte_causal=causal.bits_per_byte,
        bits_per_byte_topk=topk,
        mean_depth=causal.mean_depth,
        kv_bytes_per_token=measured_kv_bytes(model, data, seq_len),
        lr=trained.lr,
        checkpoint=str(trained.checkpoint),
    )


@torch.inference_mode()
def measured_kv_bytes(model: Transformer, data: Windows, seq_len: int, windows: int = 16) -> float:
    """Bytes per token in a real cache after reading validation text."""
    tokens_BT = data.batch(data.spread(seq_len)[:windows], seq_len).tokens_BT
    cache = KVCache(model.config, len(tokens_BT))
    model(tokens_BT, cache=cache, logits="last")
    return cache.nbytes / tokens_BT.numel()


def text_table(rows: Sequence[TextRow]) -> Table:
    """One column per model, so that it fits 80 characters."""
    made = Table(title="Text, equal training FLOPs", title_justify="left")
    made.add_column("")
    for row in rows:
        made.add_column(row.name, justify="right")
    lines: dict[str, Callable[[TextRow], str]] = {
        "unique parameters": lambda r: f"{r.params_non_embedding:,}",
        "effective layers": lambda r: str(r.effective_layers),
        "training FLOPs": lambda r: f"{r.train_flops:.2e}",
        "tokens seen": lambda r: f"{r.tokens:,}",
        "training time": lambda r: f"{r.wall_s:.0f} s",
        "bits/byte, causal": lambda r: f"{r.bits_per_byte_causal:.3f}",
        "bits/byte, top-k (non-causal)": lambda r: (
            "–" if r.bits_per_byte_topk is None else f"{r.bits_per_byte_topk:.3f}"
        ),
        "mean depth, causal": lambda r: f"{r.mean_depth:.2f}",
        "KV bytes per token": lambda r: f"{r.kv_bytes_per_token:,.0f}",
        "peak learning rate": lambda r: f"{r.lr:g}",
    }
    for name, cell in lines.items():
        made.add_row(name, *(cell(row) for row in rows))
    return made


def text_verdict(rows: Sequence[TextRow]) -> str:
    """What the numbers say, computed from them."""
    by_name = {r.name: r.bits_per_byte_causal for r in rows}
    order = ", ".join(f"{n} {b:.3f}" for n, b in sorted(by_name.items(), key=lambda item: item[1]))
    gain = by_name["one pass"] - by_name["MoR"]
    depth = next(r.mean_depth for r in rows if r.name == "MoR")
    if depth < LEAST_DEPTH:
        control = (
            f"MoR's tokens take {depth:.2f} recursions on average, so it is nearly one pass too: "
            "nothing can be said about depth."
        )
    elif gain > CLEAR:
        control = f"One pass is worse than MoR by {gain:.3f}: depth pays on this text."
    elif gain >= -CLEAR:
        control = (
            f"One pass and MoR differ by {abs(gain):.3f}, which is within noise: depth does not "
            "pay yet on text at this size and budget."
        )
    else:
        control = (
            f"One pass is better than MoR by {-gain:.3f}: depth does not pay yet on text at this "
            "size and budget."
        )
    return f"Causal bits per byte, best first: {order}.\n{control}"


def show_sample(
    model: Transformer,
    corpus: Corpus,
    console: Console,
    *,
    tokens: int = 110,
    prompt: str = "Return a new",
) -> None:
    """Text that the model writes, coloured by the depth of each token."""
    ids = corpus.tokenizer.encode(prompt)
    params = SamplingParams(max_new_tokens=tokens, temperature=0.7, top_p=0.9, seed=1)
    result = generate(model, [ids], params)[0]
    console.print("\nText that MoR writes, coloured by recursion depth")
    console.print(depth_legend(model.config.least_depth, model.config.num_recursions, console))
    console.print(depth_text(corpus.tokenizer, result, console))
    console.print(f"mean depth {result.mean_depth:.2f}", highlight=False)
