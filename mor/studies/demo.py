"""The main job on one page: train four small models on real text, compare them fairly, look at
one."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from mor.analysis.depth_text import depth_legend, depth_text
from mor.costs import flops as costs
from mor.data.stream import Corpus, DataConfig, Windows, load_corpus
from mor.evaluation.nll import evaluate
from mor.generation import SamplingParams, generate
from mor.model.config import ModelConfig, RouterConfig, preset
from mor.model.kv_cache import KVCache
from mor.model.transformer import Transformer
from mor.run_folder import RunFolder
from mor.training.config import TrainConfig
from mor.training.loop import train
from mor.training.optim import OptimConfig

SHAPE: dict[str, Any] = dict(
    dim=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=176, max_seq_len=256, init_std=0.08
)
LAYERS = 8
SEQ_LEN = 128
BATCH_SIZE = 8
# Peak learning rates, tuned per family on this budget (LOG.md).
LR = {"vanilla": 4e-3, "recursive": 8e-3, "mor": 8e-3, "single pass": 1.6e-2}


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One trained model. wall_s is training alone; kv_bytes_per_token was measured on a real fp32
    cache."""

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


def models() -> dict[str, ModelConfig]:
    """Three families of equal effective depth, and the control with MoR's unique layers and one
    pass."""
    return {
        "vanilla": preset("tiny", num_layers=LAYERS, **SHAPE),
        "recursive": preset("tiny", num_layers=LAYERS, num_recursions=3, router="fixed", **SHAPE),
        "mor": preset(
            "tiny",
            num_layers=LAYERS,
            num_recursions=3,
            router=RouterConfig(kind="expert_choice"),
            **SHAPE,
        ),
        "single pass": preset("tiny", num_layers=LAYERS - 4, **SHAPE),
    }


def run_demo(out: Path, *, flops: float, seed: int, console: Console) -> list[DemoRow]:
    """Train, compare, plot and sample. Returns the table's rows, also written to
    ``out/results.json``."""
    _clear(out)
    data = DataConfig(vocab_size=1024, validation_share=0.08)
    corpus = load_corpus(data)
    console.print(
        "[bold]Corpus[/bold]: this Python's own help topics and docstrings: "
        f"{corpus.train.describe()} to train on; "
        f"{corpus.validation.describe()} held out.",
        f"[bold]Budget[/bold]: {flops:.1e} training FLOPs for each of four models.\n",
        sep="\n",
        markup=True,
        highlight=False,
    )
    rows, curves, mor = [], {}, None
    for name, model_config in models().items():
        config = TrainConfig(
            model=model_config,
            data=data,
            device="cpu",
            out=str(out / name.replace(" ", "-")),
            flops=flops,
            seq_len=SEQ_LEN,
            batch_size=BATCH_SIZE,
            eval_windows=48,
            seed=seed,
            optim=OptimConfig(lr=LR[name]),
        )
        config = replace(config, eval_every=max(1, round(flops / step_flops(config) / 8)))
        result = train(config, corpus=corpus, console=console, label=f"{name:<11}")
        if not result.finished:
            raise ValueError("the demo was interrupted; run it again, it starts afresh")
        model = result.state.model.eval()
        rows.append(_row(name, config, model, corpus.validation, result.state, result.path))
        metrics = RunFolder(Path(config.out)).read_metrics()
        curves[name] = [
            (m["flops"], m["validation_bits_per_byte"])
            for m in metrics
            if "validation_bits_per_byte" in m
        ]
        mor = model if name == "mor" else mor
    plot_curves(curves, out / "loss_over_flops.png")
    machine = dict(
        device="cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
    )
    results = dict(rows=[asdict(row) for row in rows], machine=machine, seed=seed)
    (out / "results.json").write_text(json.dumps(results, indent=2))
    console.print(table(rows))
    console.print(verdict(rows), highlight=False, soft_wrap=True)
    assert mor is not None
    _show_sample(mor, corpus, console)
    console.print(
        f"\n[bold]Written[/bold] to {out}/: loss_over_flops.png, results.json, and for each model "
        "metrics.jsonl, "
        f"train.json and checkpoints. Go on with:\n  mor generate {out}/mor --prompt 'Return the' "
        "--show-depth",
        markup=True,
        highlight=False,
        soft_wrap=True,
    )
    return rows


def _clear(out: Path) -> None:
    """Make room for a new demo; refuses to delete anything but an earlier one."""
    marker = out / ".mor-demo"
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise ValueError(f"{out} holds other files than an earlier demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    marker.touch()


def step_flops(config: TrainConfig) -> float:
    return config.batch_size * costs.train_flops(config.model, config.seq_len)


def _row(
    name: str, config: TrainConfig, model: Transformer, data: Windows, state: Any, path: Path
) -> DemoRow:
    causal = evaluate(model, data, seq_len=SEQ_LEN)
    topk = (
        evaluate(model, data, seq_len=SEQ_LEN, selection="topk") if model.router.has_topk else None
    )
    return DemoRow(
        name=name,
        params_non_embedding=costs.non_embedding_params(model.config),
        effective_layers=model.config.num_layers,
        train_flops=state.flops,
        tokens=state.tokens,
        wall_s=state.train_s,
        bits_per_byte_causal=causal.bits_per_byte,
        bits_per_byte_topk=topk.bits_per_byte if topk else None,
        mean_depth=causal.mean_depth,
        kv_bytes_per_token=measured_kv_bytes(model, data),
        lr=config.optim.lr,
        checkpoint=str(path),
    )


@torch.inference_mode()
def measured_kv_bytes(model: Transformer, data: Windows, windows: int = 16) -> float:
    """Bytes per token in a real cache after reading validation text."""
    count = min(windows, data.num_windows(SEQ_LEN))
    cache = KVCache(model.config, count)
    model(data.batch(range(count), SEQ_LEN).tokens_BT, cache=cache, logits="last")
    return cache.nbytes / (count * SEQ_LEN)


def table(rows: list[DemoRow]) -> Table:
    """One column per model, so that it fits 80 characters."""
    made = Table(title="Equal training FLOPs", title_justify="left")
    made.add_column("")
    for row in rows:
        made.add_column(row.name, justify="right")
    lines: dict[str, Callable[[DemoRow], str]] = {
        "unique params": lambda r: f"{r.params_non_embedding:,}",
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


def verdict(rows: list[DemoRow]) -> str:
    """What the numbers say, worked out from them. Unique params are without embeddings."""
    by_name = {r.name: r.bits_per_byte_causal for r in rows}
    order = " < ".join(f"{n} {b:.3f}" for n, b in sorted(by_name.items(), key=lambda item: item[1]))
    gain = by_name["single pass"] - by_name["mor"]
    if gain > 0.02:
        control = "The single pass is clearly worse than MoR: depth pays at this size and budget."
    else:
        control = (
            f"The single pass is not clearly worse than MoR (difference {gain:+.3f}): at this size "
            "and budget extra "
            "depth does not pay, so the table says little about routing."
        )
    return (
        f"Causal bits per byte, best first: {order}.\n{control} One seed; unique params "
        "exclude embeddings."
    )


def plot_curves(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for (name, points), style in zip(curves.items(), ("-", "--", "-", ":"), strict=True):
        marker = "o" if name == "mor" else None
        axes.plot(*zip(*points, strict=True), style, marker=marker, markersize=4, label=name)
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("validation bits per byte (causal)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _show_sample(
    model: Transformer, corpus: Corpus, console: Console, prompt: str = "Return a new"
) -> None:
    ids = corpus.tokenizer.encode(prompt)
    params = SamplingParams(max_new_tokens=110, temperature=0.7, top_p=0.9, seed=1)
    result = generate(model, [ids], params)[0]
    console.print(
        "\n[bold]Sample from the MoR model[/bold], coloured by recursion depth", markup=True
    )
    console.print(depth_legend(model.config.num_recursions, console))
    console.print(depth_text(corpus.tokenizer, result, console))
    console.print(f"mean depth {result.mean_depth:.2f}", highlight=False)
