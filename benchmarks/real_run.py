"""Vanilla, recursive-3, MoR-2 and MoR-3 of equal depth at equal training FLOPs on a prepared
corpus.

    mor data prepare CORPUS --out DATA --tokenizer TOKENIZER
    python benchmarks/real_run.py DATA --out runs/real

Learning rates are tuned first, for each model alone, on a share of the budget; then each model
trains once with its best rate. Run it again after an interruption: finished runs are kept. Causal
validation.
"""

import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console

from mor import checkpoint
from mor.analysis.figures import loss_over_flops
from mor.analysis.style import save
from mor.costs import flops as costs
from mor.data.config import DataConfig
from mor.data.corpus import load_corpus
from mor.evaluation.nll import evaluate
from mor.model.config import RouterConfig, preset
from mor.run_folder import RunFolder
from mor.training.config import TrainConfig, step_flops
from mor.training.loop import train
from mor.training.optim import OptimConfig

SHAPE = dict(
    dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ffn_dim=344,
    max_seq_len=256,
    num_layers=14,
    init_std=0.08,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: tyro.conf.Positional[Path]
    """What ``mor data prepare`` wrote."""
    validation: Path | None = None
    """The same for validation text, where the first holds none."""
    out: Path = Path("runs/real")
    flops: float = 6e13
    """Training FLOPs of each final run (exact count, head included)."""
    tuning_flops: float = 8e12
    lrs: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    seed: int = 0
    threads: int = 2


def models():
    expert = RouterConfig(kind="expert_choice")
    return {
        "vanilla": preset("mini", **SHAPE),
        "recursive-3": preset("mini", num_recursions=3, router="fixed", **SHAPE),
        "mor-2": preset("mini", num_recursions=2, router=expert, **SHAPE),
        "mor-3": preset("mini", num_recursions=3, router=expert, **SHAPE),
    }


def data_config(settings):
    validation = settings.validation
    return DataConfig(
        path=str(settings.data), validation_path=None if validation is None else str(validation)
    )


def run(settings, corpus, model, lr, flops, folder):
    """Train into ``folder``, or take up what is there; returns the last validation NLL."""
    config = TrainConfig(
        model=model,
        data=data_config(settings),
        optim=OptimConfig(lr=lr),
        out=str(folder),
        flops=flops,
        seq_len=256,
        batch_size=4,
        eval_windows=32,
        seed=settings.seed,
        device="cpu",
    )
    sized = replace(config, model=model.replace(vocab_size=corpus.tokenizer.vocab_size))
    per_step = step_flops(sized, 0)
    every = max(1, round(flops / per_step / 8))
    config = replace(config, eval_every=every, save_every=every)
    if not (folder / "done").exists():
        result = train(
            config, resume=folder.exists(), corpus=corpus, console=Console(), label=folder.name
        )
        if not result.finished:
            raise SystemExit("interrupted; run it again to go on")
        (folder / "done").touch()
    return [m for m in RunFolder(folder).read_metrics() if "validation_nll" in m]


def main():
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    corpus = load_corpus(data_config(settings))
    tuned = {}
    for name, model in models().items():
        found = {}
        for lr in settings.lrs:
            folder = settings.out / "tuning" / f"{name}-lr{lr:g}"
            found[lr] = run(settings, corpus, model, lr, settings.tuning_flops, folder)[-1][
                "validation_nll"
            ]
        tuned[name] = found
    rows, curves = [], {}
    for name, model in models().items():
        lr = min(tuned[name], key=tuned[name].get)
        metrics = run(settings, corpus, model, lr, settings.flops, settings.out / name)
        curves[name] = [(m["flops"], m["validation_bits_per_byte"]) for m in metrics]
        config, trained, _ = checkpoint.load(settings.out / name)
        causal = evaluate(trained.eval(), corpus.validation, seq_len=256, max_windows=128)
        rows.append(
            dict(
                model=name,
                params_non_embedding=costs.non_embedding_params(config),
                tokens=metrics[-1]["tokens"],
                train_flops=metrics[-1]["flops"],
                lr=lr,
                tuning_nll=tuned[name],
                nll=causal.nll,
                bits_per_byte=causal.bits_per_byte,
                mean_depth=causal.mean_depth,
            )
        )
        print({k: v for k, v in rows[-1].items() if k != "tuning_nll"}, flush=True)
    save(loss_over_flops(curves), settings.out, "loss_over_flops")
    machine = dict(
        threads=settings.threads, torch=torch.__version__, python=platform.python_version()
    )
    print(json.dumps(dict(rows=rows, seed=settings.seed, machine=machine)))


if __name__ == "__main__":
    main()
