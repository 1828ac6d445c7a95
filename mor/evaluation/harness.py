"""The paper's six benchmarks through lm-evaluation-harness: its tasks, prompts, metrics and ``hf``
model class.

Only the place that documents come from is ours, and only with local copies of the data
(``mor.evaluation.task_data``).
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mor.evaluation.task_data import LocalTask, load_local
from mor.files import extra

with extra("eval", needed_for="mor eval --tasks"):
    import datasets
    import lm_eval
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.config.group import AggMetricConfig
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable


class _Benchmark(NamedTuple):
    """stock: lm-eval's name. eval_split, shots_split: what its task reads. changes: to the task's
    settings."""

    stock: str
    folder: str
    eval_split: str
    shots_split: str
    changes: dict[str, Any] = {}  # noqa: RUF012 (never written)


class _PaperTask(NamedTuple):
    metric: str
    parts: tuple[_Benchmark, ...]


# Without perplexity, which the paper does not report: lm-eval would bootstrap its error for
# minutes.
_ACC_ONLY = {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
_PAPER_TASKS = {
    "lambada": _PaperTask(
        "acc", (_Benchmark("lambada_openai", "lambada", "test", "test", _ACC_ONLY),)
    ),
    "hellaswag": _PaperTask(
        "acc_norm", (_Benchmark("hellaswag", "hellaswag", "validation", "train"),)
    ),
    "piqa": _PaperTask("acc_norm", (_Benchmark("piqa", "piqa", "validation", "train"),)),
    "winogrande": _PaperTask(
        "acc", (_Benchmark("winogrande", "winogrande", "validation", "train"),)
    ),
    "arc": _PaperTask(
        "acc_norm",
        (
            _Benchmark("arc_easy", "arc", "test", "train"),
            _Benchmark("arc_challenge", "arc", "test", "train"),
        ),
    ),
    "mmlu": _PaperTask("acc", (_Benchmark("mmlu", "mmlu/default", "test", "dev"),)),
}
TASK_NAMES = tuple(_PAPER_TASKS)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """score: a share of 1. stderr: as lm-eval gives it; it gives none for ARC's mean and for single
    items."""

    task: str
    metric: str
    score: float
    stderr: float | None
    items: int


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """average: mean of the paper's six scores, None unless all six ran. parts: ARC's two sets.

    cut_requests: requests longer than the model's context, of which lm-eval dropped the beginning.
    full: everything lm-eval returns, samples included.
    """

    tasks: tuple[TaskResult, ...]
    parts: tuple[TaskResult, ...]
    average: float | None
    shots: int
    limit: int | None
    cut_requests: int
    full: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything but ``full``, for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "full"}
        return values | {
            "tasks": [vars(row) for row in self.tasks],
            "parts": [vars(row) for row in self.parts],
        }

    def write_full(self, path: Path) -> None:
        path.write_text(json.dumps(self.full, default=handle_non_serializable, ensure_ascii=False))


def check_tasks(names: Sequence[str]) -> None:
    """Raise ValueError unless the names are some of TASK_NAMES, each once."""
    for name in names:
        if name not in _PAPER_TASKS:
            close = difflib.get_close_matches(name, _PAPER_TASKS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"there is no task {name!r}{hint} Tasks: {', '.join(TASK_NAMES)}")
    if len(set(names)) < len(names) or not names:
        raise ValueError(
            f"give each task once, and at least one of {', '.join(TASK_NAMES)}; got "
            f"{', '.join(names)}"
        )


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = TASK_NAMES,
    *,
    shots: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    task_data: Sequence[Path] = (),
) -> HarnessResult:
    """Score a transformers model on some of TASK_NAMES.

    limit: items of each task, spread evenly over its documents (MMLU: over all subjects; ARC: half
    easy, half challenge). task_data: folders with local copies; without any, lm-eval reads the
    Hugging Face hub.
    """
    check_tasks(tasks)
    if shots < 0 or batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(
            f"shots must be 0 or more, batch_size and limit 1 or more; got {shots}, {batch_size}, "
            f"{limit}"
        )
    with _quiet() as cut:
        manager = _manager()
        parts = [part for name in tasks for part in _PAPER_TASKS[name].parts]
        built = {part.stock: _build(manager, part, shots, task_data) for part in parts}
        samples = {} if limit is None else _samples(tasks, built, limit)
        full = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[
                item
                for stock, part in built.items()
                for item in _chosen(stock, part, samples, limit)
            ],
            num_fewshot=shots,
            samples=samples or None,
            task_manager=manager,
        )
    rows = {name: _rows(_PAPER_TASKS[name], full) for name in tasks}
    merged = tuple(_mean(name, found) for name, found in rows.items())
    return HarnessResult(
        tasks=merged,
        parts=tuple(row for found in rows.values() if len(found) > 1 for row in found),
        average=paper_average(merged),
        shots=shots,
        limit=limit,
        cut_requests=cut.count,
        full=full,
    )


def paper_average(rows: Sequence[TaskResult]) -> float | None:
    """Mean score of the paper's six tasks, each counted once; None unless all six are there."""
    scores = {row.task: row.score for row in rows}
    return (
        sum(scores[name] for name in TASK_NAMES) / len(TASK_NAMES)
        if set(scores) == set(TASK_NAMES)
        else None
    )


def _rows(task: _PaperTask, full: dict[str, Any]) -> list[TaskResult]:
    return [_row(full["results"][part.stock], part.stock, task.metric) for part in task.parts]


def _row(found: dict[str, Any], stock: str, metric: str) -> TaskResult:
    stderr = found.get(f"{metric}_stderr,none")
    return TaskResult(
        task=stock,
        metric=metric,
        score=float(found[f"{metric},none"]),
        stderr=float(stderr) if isinstance(stderr, float) else None,
        items=int(found["sample_len"]),
    )


def _mean(name: str, parts: list[TaskResult]) -> TaskResult:
    return TaskResult(
        task=name,
        metric=parts[0].metric,
        score=sum(row.score for row in parts) / len(parts),
        stderr=parts[0].stderr if len(parts) == 1 else None,
        items=sum(row.items for row in parts),
    )


# Tasks and the documents they are asked about


def _manager() -> TaskManager:
    root = Path(lm_eval.__file__).parent / "tasks"
    folders = sorted({part.folder for task in _PAPER_TASKS.values() for part in task.parts})
    return TaskManager(include_defaults=False, include_path=[root / folder for folder in folders])


def _build(
    manager: TaskManager, part: _Benchmark, shots: int, task_data: Sequence[Path]
) -> list[Task]:
    """lm-eval's own tasks for one benchmark: one, or MMLU's 57 in the order of their names."""
    if task_data:
        specs = _local_specs(part, shots, task_data)
    else:
        specs = [{"group" if part.stock == "mmlu" else "task": part.stock, **part.changes}]
    try:
        found = manager.load([{"group": "of " + part.stock, "task": specs}])["tasks"]
    except OSError as error:
        raise ValueError(
            f"the data of {part.stock} could not be had from the Hugging Face hub ({error}); "
            "give a folder with local copies: --task-data DIR"
        ) from error
    return [found[name] for name in sorted(found)]


def _local_specs(part: _Benchmark, shots: int, task_data: Sequence[Path]) -> list[dict[str, Any]]:
    """The stock tasks with their documents exchanged, as lm-eval takes them."""
    splits = dict.fromkeys([part.eval_split, *([part.shots_split] if shots else [])])
    try:
        local = load_local(part.stock, list(splits), task_data)
    except ValueError as error:
        if not shots or part.shots_split == part.eval_split:
            raise
        hint = (
            f"the examples of --shots {shots} come from the {part.shots_split} split; "
            "without it use --shots 0"
        )
        raise ValueError(f"{error}. {hint}") from None
    return [
        {
            "task": name,
            "custom_dataset": _documents(records),
            "training_split": "train" if "train" in splits else None,
            "validation_split": "validation" if part.eval_split == "validation" else None,
            "test_split": "test" if part.eval_split == "test" else None,
            "fewshot_split": "dev" if "dev" in splits else None,
            **({"process_docs": None} if local.preprocessed else {}),
            **part.changes,
        }
        for name, records in _by_task(part.stock, local).items()
    ]


def _by_task(stock: str, local: LocalTask) -> dict[str, dict[str, list[dict]]]:
    """Records by lm-eval's task name and split; MMLU has a task for each subject."""
    if stock != "mmlu":
        return {stock: local.splits}
    found: dict[str, dict[str, list[dict]]] = {}
    for split, records in local.splits.items():
        for record in records:
            found.setdefault(f"mmlu_{record['subject']}", {}).setdefault(split, []).append(record)
    return found


def _documents(splits: dict[str, list[dict]]) -> Callable[..., datasets.DatasetDict]:
    def load(**_: Any) -> datasets.DatasetDict:  # lm-eval passes the task's metadata
        return datasets.DatasetDict(
            {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        )

    return load


def _samples(
    names: Sequence[str], built: dict[str, list[Task]], limit: int
) -> dict[str, list[int]]:
    """Indices of the documents to ask about, by lm-eval's task name; tasks that get none are
    absent."""
    chosen: dict[str, list[int]] = {}
    for name in names:
        parts = _PAPER_TASKS[name].parts
        if limit < len(parts):
            raise ValueError(
                f"{name} is the mean of {len(parts)} sets; it needs a limit of at least "
                f"{len(parts)}"
            )
        for place, part in enumerate(parts):
            share = limit // len(parts) + (place < limit % len(parts))
            sizes = {task.task_name: len(task.eval_docs) for task in built[part.stock]}
            chosen |= spread(sizes, share)
    return chosen


def spread(sizes: dict[str, int], count: int) -> dict[str, list[int]]:
    """``count`` places spread evenly over lists that follow each other: indices by list, empty ones
    left out."""
    total = sum(sizes.values())
    count = min(count, total)
    chosen: dict[str, list[int]] = {}
    places = iter([i * total // count for i in range(count)])
    place = next(places, total)
    start = 0
    for name, size in sizes.items():
        while place < start + size:
            chosen.setdefault(name, []).append(place - start)
            place = next(places, total)
        start += size
    return chosen


def _chosen(
    stock: str, tasks: list[Task], samples: dict[str, list[int]], limit: int | None
) -> list[Task | Group]:
    """What lm-eval is to run: the tasks with documents, MMLU's in a group that weights them by size
    as its own does."""
    kept = [task for task in tasks if limit is None or task.task_name in samples]
    if stock != "mmlu":
        return list(kept)
    group = Group(stock, aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=True)])
    for task in kept:
        group.add(task)
    return [group]


# What lm-eval prints


class _CutRequests(logging.Filter):
    """Counts lm-eval's notices of requests longer than the context; passes errors only."""

    count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += record.getMessage().startswith("Combined length of context")
        return record.levelno >= logging.ERROR


@contextlib.contextmanager
def _quiet() -> Iterator[_CutRequests]:
    """lm-eval without its advice; progress bars only on a terminal."""
    cut = _CutRequests()
    library, its_model = logging.getLogger("lm_eval"), logging.getLogger(HFLM.__module__)
    levels = library.level, its_model.level
    library.setLevel(logging.ERROR)
    its_model.setLevel(logging.WARNING)
    its_model.addFilter(cut)
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else _without_bars():
            yield cut
    finally:
        its_model.removeFilter(cut)
        library.setLevel(levels[0])
        its_model.setLevel(levels[1])


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Holds stderr back and passes on what is no progress bar: lm-eval has no switch for its
    bars."""
    held = io.StringIO()
    try:
        with contextlib.redirect_stderr(held):
            yield
    finally:
        for line in held.getvalue().split("\n"):
            if line and "\r" not in line:
                print(line, file=sys.stderr)


# Models


def load_model(checkpoint: str | Path, *, device: str = "auto") -> tuple[Any, Any]:
    """A transformers model and tokenizer from a mor run or checkpoint, a transformers directory, a
    hub name or a .gguf file. fp32 on CPUs, elsewhere the precision it was saved in."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mor.hub.modeling  # noqa: F401 (registers the model class)
    from mor.device import pick_device

    place = pick_device(device)
    name, settings = _locate(str(checkpoint))
    with contextlib.nullcontext() if sys.stderr.isatty() else _without_bars():
        dtype = torch.float32 if place.type == "cpu" else "auto"
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **settings)
        return model.to(place).eval(), AutoTokenizer.from_pretrained(name, **settings)


def _locate(checkpoint: str) -> tuple[str, dict[str, str]]:
    from mor.checkpoint import resolve

    path = Path(checkpoint)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        return str(path.parent), {"gguf_file": path.name}
    if path.exists() or checkpoint.startswith((".", os.sep)):
        return str(resolve(path)), {}
    return checkpoint, {}
