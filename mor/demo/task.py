"""The demo on state tracking, whose questions need up to 16 steps: one pass, recursive, MoR.

B rows of the batch · T columns
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mor.analysis.depth_text import depth_legend, depth_text
from mor.costs import flops as costs
from mor.data.config import DataConfig
from mor.data.corpus import Corpus
from mor.data.stream import TaskData
from mor.demo.experiment import ROUTED, Experiment, Trained
from mor.evaluation.nll import by_hops
from mor.generation import Generation
from mor.model.config import preset
from mor.model.transformer import Transformer

STATES, HOPS, SPANS = 5, 16, 4
CLEAR = 0.1  # share of right answers
SHAPE: dict[str, Any] = dict(num_kv_heads=4, init_std=0.125, max_seq_len=64)


def task_experiment(flops: float, *, quick: bool) -> Experiment:
    """Models and rate of studies/sizes/small.toml. quick: small batches, little validation data."""
    return Experiment(
        name="task",
        data=DataConfig(path=f"task:state-tracking?states={STATES}&moves=4&hops={HOPS}"),
        models={
            "one pass": preset("tiny", num_layers=3, **SHAPE),
            "recursive": preset("tiny", num_layers=6, num_recursions=4, router="fixed", **SHAPE),
            "MoR": preset("tiny", num_layers=6, num_recursions=4, **ROUTED, **SHAPE),
        },
        lr=dict.fromkeys(("one pass", "recursive", "MoR"), 4e-3),
        flops=flops,
        seq_len=64,
        batch_size=4 if quick else 16,
        eval_windows=4 if quick else 64,
    )


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One trained model. answers_right_by_hops and mean_depth_by_hops: from one hop on, causal."""

    name: str
    params_non_embedding: int
    effective_layers: int
    train_flops: float
    tokens: int
    wall_s: float
    answers_right: float
    answers_right_by_hops: list[float]
    mean_depth_by_hops: list[float]
    lr: float
    checkpoint: str

    @property
    def hard(self) -> float:
        """Share of right answers to questions of more than half the hops, each number equally."""
        return fmean(self.answers_right_by_hops[HOPS // 2 :])


def task_row(name: str, trained: Trained, data: TaskData, seq_len: int, windows: int) -> TaskRow:
    config = trained.model.config
    found = by_hops(trained.model, data, seq_len, windows)
    return TaskRow(
        name=name,
        params_non_embedding=costs.non_embedding_params(config),
        effective_layers=config.num_layers,
        train_flops=trained.flops,
        tokens=trained.tokens,
        wall_s=trained.wall_s,
        answers_right=found["answers_right"],
        answers_right_by_hops=found["answers_right_by_hops"],
        mean_depth_by_hops=found["mean_depth_by_hops"][1:],  # the first: nothing is asked
        lr=trained.lr,
        checkpoint=str(trained.checkpoint),
    )


def task_table(rows: Sequence[TaskRow]) -> Table:
    """Right answers and mean depth by spans of hops, in 80 characters."""
    made = Table(title="State tracking, equal training FLOPs", title_justify="left")
    width = HOPS // SPANS
    spans = [(i * width, (i + 1) * width) for i in range(SPANS)]
    made.add_column("")
    made.add_column("layers")
    for a, b in spans:
        made.add_column(f"{a + 1}–{b} hops", justify="right")
    cells_of = {"answers_right_by_hops": "{:.0%} right", "mean_depth_by_hops": "depth {:.2f}"}
    for what, cell in cells_of.items():
        for row in rows:
            values = getattr(row, what)
            cells = [cell.format(fmean(values[a:b])) for a, b in spans]
            made.add_row(row.name, str(row.effective_layers), *cells)
        made.add_section()
    return made


def task_verdict(rows: Sequence[TaskRow]) -> str:
    """What the numbers say, computed from them."""
    hard = {row.name: row.hard for row in rows}
    said = ", ".join(f"{name} {share:.0%}" for name, share in hard.items())
    gains = {name: hard[name] - hard["one pass"] for name in ("recursive", "MoR")}
    paying = [name for name, gain in gains.items() if gain > CLEAR]
    if paying:
        more = " and ".join(f"{name} {100 * gains[name]:.0f}" for name in paying)
        plain = (
            "Depth pays on this task. Right answers gained, in percentage points, over the same "
            f"unique layers in one pass: {more}."
        )
    else:
        plain = "No model is clearly better than one pass: depth did not pay here."
    depth = next(row.mean_depth_by_hops for row in rows if row.name == "MoR")
    easy, late = fmean(depth[: HOPS // SPANS]), fmean(depth[-HOPS // SPANS :])
    routed = "sends harder questions deeper" if late > easy + 0.5 else "does not follow the hops"
    return (
        f"Right answers to questions of {HOPS // 2 + 1} to {HOPS} hops: {said} (chance "
        f"{1 / STATES:.0%}).\n{plain}\nMoR {routed}: mean depth {easy:.2f} at 1 to "
        f"{HOPS // SPANS} hops, {late:.2f} at {HOPS - HOPS // SPANS + 1} to {HOPS}."
    )


@torch.inference_mode()
def show_problem(model: Transformer, corpus: Corpus, console: Console, words: int = 40) -> str:
    """A problem coloured by the depth that the model gives each word. Returns its first words."""
    assert isinstance(corpus.validation, TaskData)
    tokens_BT = corpus.validation.problems([0], 64).tokens_BT[:, :words]
    depth = model(tokens_BT).routing.depth_BT[0]
    ids = tokens_BT[0].tolist()
    console.print(
        "\nA problem as MoR reads it: =3 sets the state, p0 to p3 move it; after each word"
    )
    console.print("the model says which state it is now. Coloured by recursion depth")
    config = model.config
    console.print(depth_legend(config.least_depth, config.num_recursions, console))
    read = Generation(prompt_ids=ids, depths=depth.tolist())
    console.print(depth_text(corpus.tokenizer, read, console))
    return corpus.tokenizer.decode(ids[:12])
