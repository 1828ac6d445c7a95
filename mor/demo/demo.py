"""What `mor demo` runs: two experiments, with tables, verdicts and pictures, in one folder."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mor.analysis.figures import loss_over_flops
from mor.analysis.style import save
from mor.data.corpus import load_corpus
from mor.data.stream import TaskData
from mor.demo.experiment import Experiment, Trained, train_one
from mor.demo.figures import answers_and_depth
from mor.demo.task import show_problem, task_experiment, task_row, task_table, task_verdict
from mor.demo.text import show_sample, text_experiment, text_row, text_table, text_verdict

FOLDER = Path("runs/demo")
QUICK = 800  # how much smaller the budgets of a quick demo are
ONE_SEED = "One seed (n = 1), so small differences mean nothing."
QUICK_NOTE = "A quick demo trains far too little to compare anything."


def run_demo(
    out: Path | None,
    *,
    text_flops: float,
    task_flops: float,
    quick: bool,
    seed: int,
    console: Console,
) -> dict[str, Any]:
    """Train, compare, draw and sample. Returns what is also written to ``results.json``.

    out: None takes the first free of runs/demo, runs/demo-2 and so on. Raises ValueError if there
    is anything in it; ends with exit code 130 when interrupted.
    """
    out = free_folder(out)
    less = QUICK if quick else 1
    experiments = (
        text_experiment(text_flops / less, quick=quick),
        task_experiment(task_flops / less, quick=quick),
    )
    started = time.perf_counter()
    console.print(f"Everything goes to {out}/", highlight=False, soft_wrap=True)
    try:
        text = _text(experiments[0], out, seed, quick, console)
        task = _task(experiments[1], out, seed, quick, console)
    except KeyboardInterrupt:
        console.print(
            f"\ninterrupted: {out}/ keeps what is trained so far; mor demo starts a new one",
            highlight=False,
            soft_wrap=True,
        )
        raise SystemExit(130) from None
    wall_s = time.perf_counter() - started
    results = dict(text=text, task=task, seed=seed, quick=quick, wall_s=wall_s, machine=_machine())
    (out / "results.json").write_text(json.dumps(results, indent=2))
    console.print(
        f"\n{wall_s / 60:.1f} minutes. {QUICK_NOTE if quick else ONE_SEED}",
        f"{out}/ holds text.png, task.png, results.json and a folder for each run.",
        f"Go on with: mor explain {out}/task/mor --text '{task['problem']}'",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )
    return results


def free_folder(out: Path | None) -> Path:
    """A folder with nothing in it. Raises ValueError if ``out`` is not one."""
    if out is None:
        numbered = (FOLDER.with_name(f"{FOLDER.name}-{i}") for i in count(2))
        out = next(folder for folder in chain([FOLDER], numbered) if not _holds_files(folder))
    if _holds_files(out):
        raise ValueError(f"{out} is not empty; choose another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _holds_files(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def _text(
    experiment: Experiment, out: Path, seed: int, quick: bool, console: Console
) -> dict[str, Any]:
    corpus = load_corpus(experiment.data)
    console.print(
        "\nText: this Python's own help topics and docstrings, "
        f"{corpus.train.describe()} to train on, {corpus.validation.describe()} held out. "
        f"{experiment.flops:.1e} training FLOPs for each of four models.",
        highlight=False,
    )
    trained = _train(experiment, corpus, out, seed, console)
    length, windows = experiment.seq_len, experiment.eval_windows if quick else None
    rows = [text_row(n, t, corpus.validation, length, windows) for n, t in trained.items()]
    curves = {name: one.curve for name, one in trained.items()}
    save(loss_over_flops(curves, "Loss on text at equal training FLOPs"), out, "text")
    console.print(text_table(rows))
    console.print(text_verdict(rows), highlight=False)
    show_sample(trained["MoR"].model, corpus, console, tokens=20 if quick else 110)
    return dict(rows=[asdict(row) for row in rows], verdict=text_verdict(rows))


def _task(
    experiment: Experiment, out: Path, seed: int, quick: bool, console: Console
) -> dict[str, Any]:
    corpus = load_corpus(experiment.data)
    assert isinstance(corpus.validation, TaskData)
    console.print(
        "\nState tracking: a state is set and then moved again and again; a question of n hops "
        f"needs n steps. {experiment.flops:.1e} training FLOPs for each of three models.",
        highlight=False,
    )
    trained = _train(experiment, corpus, out, seed, console)
    length, windows = experiment.seq_len, 16 if quick else 256
    rows = [task_row(n, t, corpus.validation, length, windows) for n, t in trained.items()]
    save(answers_and_depth(rows), out, "task")
    console.print(task_table(rows))
    console.print(task_verdict(rows), highlight=False)
    problem = show_problem(trained["MoR"].model, corpus, console)
    return dict(rows=[asdict(row) for row in rows], verdict=task_verdict(rows), problem=problem)


def _train(
    experiment: Experiment, corpus: Any, out: Path, seed: int, console: Console
) -> dict[str, Trained]:
    return {
        name: train_one(experiment, name, corpus, out, seed=seed, console=console)
        for name in experiment.models
    }


def _machine() -> dict[str, Any]:
    return dict(
        device="cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
    )
