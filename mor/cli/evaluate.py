"""mor eval"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from mor.cli.command import Command
from mor.cli.depth import parse_depth, parse_depths
from mor.cli.show import cell, print_json
from mor.data.manifest import is_prepared
from mor.model.config import Selection
from mor.settings import NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from mor.checkpoint import Checkpoint
    from mor.data.stream import Windows
    from mor.evaluation.depth_curve import AtDepth
    from mor.evaluation.harness import HarnessResult
    from mor.evaluation.nll import Evaluation


CURVE_FILES = (".svg", ".png", ".csv")


class Eval(Command):
    """NLL, perplexity and bits per byte of a checkpoint, or with --tasks its scores on the paper's
    benchmarks. Causal unless asked otherwise."""

    checkpoint: Positional[Path]
    """A run or checkpoint; with --tasks also a transformers directory, hub name or .gguf file."""
    data: Path | None = None
    """Text, all of which is read, or prepared data. Default: the run's validation text."""
    text_field: str = "text"
    split: str | None = None
    """Of prepared data: train or validation. Default: validation, or the only one there is."""
    selection: Annotated[Selection, arg(aliases=["--routing"])] = "threshold"
    """topk is the paper's evaluation: it sees the future, and the result is labelled non-causal."""
    by_depth: bool = False
    """One row for each cap on the depth."""
    max_depth: PositiveInt | None = None
    """Cap on every token's recursions."""
    depth: str | None = None
    """Mean depths, one row for each, such as 1.5,2,2.5,3,full (55% is a share of full depth); with
    --tasks, one of them."""
    seq_len: PositiveInt | None = None
    """Tokens in a window, of which each sees those before it. Default: as in training."""
    max_windows: PositiveInt | None = None
    """Score only so many windows, spread evenly over the text."""
    tasks: str | None = None
    """Some of lambada,hellaswag,piqa,winogrande,arc,mmlu: run them through
    lm-evaluation-harness, which reads their data from the Hugging Face hub or its cache."""
    include_path: Path | None = None
    """For --tasks without the hub: a folder of lm-eval task files, each of which takes the place of
    lm-eval's own of the same name, such as piqa.yaml with `include: LM_EVAL/tasks/piqa/piqa.yaml`,
    `dataset_path: json` and `dataset_kwargs: {data_files: {train: FILE, validation: FILE}}`."""
    shots: NonNegativeInt = 0
    """Solved examples before each question."""
    limit: PositiveInt | None = None
    """Items of each task, spread evenly over its documents; of all MMLU subjects together."""
    batch_size: PositiveInt = 8
    """Of --tasks; it changes the speed, not the scores."""
    out: Path | None = None
    """With --tasks: write everything lm-eval returns, with every answer, to this file. With
    --depth: write the curve, as a figure (.svg or .png: loss against spent depth and against time)
    or as a table (.csv)."""
    device: str = "auto"
    """auto, cpu, cuda or another PyTorch device; --tasks choose for themselves."""
    json: bool = False

    def without_effect(self) -> Iterator[tuple[str, str]]:
        if self.tasks is None:
            yield "include_path shots limit batch_size", "without --tasks"
            if self.depth is None:
                yield "out", "without --tasks or --depth"
            if self.by_depth:
                yield "max_depth", "with --by-depth, which has a row for each"
            if self.depth:
                yield "by_depth max_depth selection", "with --depth, a causal rule of its own"
            if self.data is None:
                yield "text_field split", "without --data"
            elif is_prepared(self.data):
                yield "text_field", "with prepared data"
        else:
            of_text = "data text_field split seq_len max_windows"
            of_routing = "selection routing by_depth max_depth device"
            if self.depth and "," in self.depth:
                raise ValueError("--tasks takes one --depth; run it once for each")
            yield f"{of_text} {of_routing}", "with --tasks, which is always causal and whole"

    def run(self, console: Console) -> None:
        if self.out and not self.out.parent.is_dir():
            raise ValueError(f"--out: {self.out.parent} is not a folder")
        if self.out and self.tasks is None and self.out.suffix not in CURVE_FILES:
            raise ValueError(f"--out: a curve is written as {', '.join(CURVE_FILES)}")
        if self.tasks is None:
            self._run_nll(console)
        else:
            self._run_tasks(self.tasks.split(","), console)

    def _run_tasks(self, names: list[str], console: Console) -> None:
        from mor.evaluation.harness import check_tasks, evaluate_tasks, load_model

        check_tasks(names)
        model, tokenizer = load_model(self.checkpoint)
        result = evaluate_tasks(
            model,
            tokenizer,
            names,
            shots=self.shots,
            limit=self.limit,
            batch_size=self.batch_size,
            include_path=self.include_path,
            depth=parse_depth(self.depth, model.config.num_recursions),
        )
        if self.out:
            result.write_full(self.out)
        if result.cut_requests:
            text = (
                f"{result.cut_requests} requests were longer than the model's context and lost "
                "their beginning"
            )
            warnings.warn(text, stacklevel=2)
        if self.json:
            print_json([{"checkpoint": str(self.checkpoint), **result.to_dict()}])
            return
        at = f" at depth {self.depth}" if self.depth else ""
        console.print(_tasks_table(result, title=f"{self.checkpoint}: {self.shots}-shot{at}"))

    def _run_nll(self, console: Console) -> None:
        from mor.checkpoint import load
        from mor.device import pick_device
        from mor.evaluation.nll import evaluate, leak
        from mor.training.validation import validation_of

        loaded = load(self.checkpoint, device=pick_device(self.device))
        data, length, mask, name = validation_of(
            self.checkpoint,
            loaded,
            self.data,
            text_field=self.text_field,
            split=self.split,
            seq_len=self.seq_len,
        )
        windows = data.num_scored(length)
        some = min(self.max_windows or windows, windows)
        text = f"{'all' if some == windows else f'{some:,} of {windows:,} windows'} of {name}"
        model, deepest = loaded.model, loaded.config.num_recursions
        if (self.max_depth or 1) > deepest:
            raise ValueError(f"--max-depth: the model has at most {deepest} recursions")
        if self.depth:
            self._run_depths(console, loaded, data, text, seq_len=length, document_mask=mask)
            return
        caps = range(1, deepest + 1) if self.by_depth else [self.max_depth or deepest]
        rows: list[Evaluation] = []
        for cap in caps:
            settings: dict[str, Any] = dict(
                seq_len=length, max_windows=self.max_windows, max_depth=cap, document_mask=mask
            )
            rows += (
                leak(model, data, **settings)
                if self.selection == "topk"
                else [evaluate(model, data, **settings)]
            )
        if self.json:
            print_json([{"text": text} | _plain(row) for row in rows])
            return
        title = f"{self.checkpoint}: {rows[0].tokens:,} tokens in windows of {length}"
        console.print(_nll_table(rows, f"{title}\n{text}"))

    def _run_depths(
        self,
        console: Console,
        loaded: Checkpoint,
        data: Windows,
        text: str,
        **settings: Any,
    ) -> None:
        """Loss against what is spent, in recursions and in time."""
        from mor.evaluation.depth_curve import depth_curve

        depths = parse_depths(self.depth or "", loaded.config.num_recursions)
        rows = depth_curve(loaded.model, data, depths, max_windows=self.max_windows, **settings)
        if self.out:
            self._write_curve(self.out, rows)
        if self.json:
            shown = [{"depth": r.depth, "tokens_per_second": r.tokens_per_second} for r in rows]
            plain = [_plain(r.found) for r in rows]
            print_json([{"text": text, **a, **b} for a, b in zip(shown, plain, strict=True)])
            return
        tokens = rows[0].found.tokens
        title = f"{self.checkpoint}: {tokens:,} tokens in windows of {settings['seq_len']}"
        console.print(_depth_table(rows, f"{title}\n{text}"))

    def _write_curve(self, out: Path, rows: Sequence[AtDepth]) -> None:
        from mor.analysis.figures import depth_curve
        from mor.analysis.report import write_table
        from mor.analysis.style import save_as

        plain = [row.to_row() for row in rows]
        if out.suffix == ".csv":
            write_table(plain, out)
        else:
            save_as(depth_curve(plain), out)


def _depth_table(rows: Sequence[AtDepth], title: str) -> Table:
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for name in ("depth", "spent", "NLL", "perplexity", "bits/byte", "deepest", "tokens/s"):
        made.add_column(name, justify="right", overflow="fold")
    for row in rows:
        found = row.found
        figures = (found.mean_depth, found.nll, found.perplexity, found.bits_per_byte)
        asked = row.depth if isinstance(row.depth, str) else f"{row.depth:g}"
        speed = f"{row.tokens_per_second:,.0f}"
        shown = ("" if x is None else cell(x) for x in figures)
        made.add_row(asked, *shown, str(found.max_depth), speed)
    return made


def _plain(row: Evaluation) -> dict[str, Any]:
    """For JSON, which has no infinity."""
    values = asdict(row)
    return values | {"perplexity": row.perplexity if math.isfinite(row.perplexity) else None}


def _tasks_table(result: HarnessResult, title: str) -> Table:
    made = Table(title=title, title_justify="left")
    made.add_column("task")
    made.add_column("metric")
    for name in ("score, %", "stderr", "items"):
        made.add_column(name, justify="right")
    for row in result.tasks:
        parts = [part for part in result.parts if part.task.startswith(f"{row.task}_")]
        for shown in (row, *parts):
            stderr = "" if shown.stderr is None else f"{100 * shown.stderr:.2f}"
            label = shown.task if shown is row else f"  {shown.task}"
            made.add_row(
                label, shown.metric, f"{100 * shown.score:.2f}", stderr, f"{shown.items:,}"
            )
    if result.average is not None:
        made.add_section()
        made.add_row("average", "", f"{100 * result.average:.2f}", "", "")
    return made


def _nll_table(rows: Sequence[Evaluation], title: str) -> Table:
    # No padding, so that it fits 80 columns.
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    made.add_column("selection", no_wrap=True)
    for name in ("max depth", "NLL", "perplexity", "bits/byte", "mean depth", "leak, nats"):
        made.add_column(name, justify="right", overflow="fold")
    for row in rows:
        figures = (row.nll, row.perplexity, row.bits_per_byte, row.mean_depth, row.leak_nats)
        label = row.selection if row.causal else f"{row.selection}, non-causal"
        made.add_row(label, str(row.max_depth), *("" if x is None else cell(x) for x in figures))
    return made
