"""The paper's six benchmarks through lm-evaluation-harness: its tasks, prompts, metrics and ``hf``
model class.

lm-eval reads the data from the Hugging Face hub, or from its cache. Task files of your own can read
it from elsewhere: see ``include_path`` of :func:`evaluate_tasks`.

B batch · T tokens · V vocabulary
"""

from __future__ import annotations

import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mor.checkpoint import check, resolve
from mor.data.stream import evenly_spaced
from mor.device import is_low, pick_device
from mor.evaluation.finite import require_finite
from mor.evaluation.quiet import quiet, without_bars
from mor.files import extra
from mor.hub_access import asking_the_hub
from mor.model.budget import Depth, budget_of
from mor.settings import suggestion

with extra("eval", needed_for="mor eval --tasks"):
    import lm_eval
    from datasets.exceptions import DatasetsError
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.config.group import AggMetricConfig
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mor.hub

STOCK_TASKS = Path(lm_eval.__file__).parent / "tasks"


class _Benchmark(NamedTuple):
    """metric: what the paper reports. parts: lm-eval's tasks, the score is their mean. folder:
    where lm-eval keeps their files."""

    metric: str
    parts: tuple[str, ...]
    folder: str


_BENCHMARKS = {
    "lambada": _Benchmark("acc", ("lambada_openai",), "lambada"),
    "hellaswag": _Benchmark("acc_norm", ("hellaswag",), "hellaswag"),
    "piqa": _Benchmark("acc_norm", ("piqa",), "piqa"),
    "winogrande": _Benchmark("acc", ("winogrande",), "winogrande"),
    "arc": _Benchmark("acc_norm", ("arc_easy", "arc_challenge"), "arc"),
    "mmlu": _Benchmark("acc", ("mmlu",), "mmlu/default"),
}
TASK_NAMES = tuple(_BENCHMARKS)
# Without perplexity, which the paper does not report: bootstrapping its error takes minutes.
_CHANGES: dict[str, dict[str, Any]] = {
    "lambada_openai": {
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    }
}


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """score: a share of 1. stderr: lm-eval's; None for ARC's mean and for single items."""

    task: str
    metric: str
    score: float
    stderr: float | None
    items: int


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """average: mean of the paper's six scores, None unless all six ran. parts: ARC's two sets.

    depth: the mean depth that was asked for; None: the model's own rule. cut_requests: requests
    longer than the model's context, of which lm-eval dropped the beginning. full: everything that
    lm-eval returns, samples included, and the depth.
    """

    tasks: tuple[TaskResult, ...]
    parts: tuple[TaskResult, ...]
    average: float | None
    shots: int
    limit: int | None
    depth: Depth
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


class _Finite(HFLM):  # type: ignore[misc]
    """lm-eval's model class, but a model that gives no numbers gets no score: lm-eval would take
    the first of several answers that cost NaN, and be right now and then."""

    def _model_call(self, inps: Tensor, *args: Any, **settings: Any) -> Tensor:
        given: Tensor = super()._model_call(inps, *args, **settings)
        logits_BTV = given.float()  # lm-eval takes the softmax in the precision of the logits
        broken = ~logits_BTV.isfinite().flatten(1).all(1)
        if broken.any():
            row = int(broken.nonzero()[0])
            text = self.tok_decode(inps[row].tolist())
            require_finite(self.model, [logits_BTV[row]], f"reading {text[:60]!r}")
        return logits_BTV


def check_tasks(names: Sequence[str]) -> None:
    """Raise ValueError unless the names are some of TASK_NAMES, each once."""
    for name in names:
        if name not in _BENCHMARKS:
            raise ValueError(
                f"there is no task {name!r}{suggestion(name, TASK_NAMES)}; choose from "
                f"{', '.join(TASK_NAMES)}"
            )
    if len(set(names)) < len(names) or not names:
        raise ValueError(
            f"give each task once, and at least one of {', '.join(TASK_NAMES)}; got "
            f"{', '.join(names) or 'none'}"
        )


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = TASK_NAMES,
    *,
    shots: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: Path | None = None,
    depth: Depth = None,
) -> HarnessResult:
    """Score a transformers model on some of TASK_NAMES.

    limit: items of each task, spread evenly over its documents (MMLU: over all subjects; ARC: half
    easy, half challenge). include_path: a folder of lm-eval task files (YAML), which take the place
    of lm-eval's own by their names, for instance to read local data. depth: the mean depth, for a
    calibrated mor model (mor/model/budget.py). Raises ValueError for an
    unknown task, for data that cannot be read and for settings out of range.
    """
    check_tasks(tasks)
    if shots < 0 or batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(
            f"shots must be 0 or more, batch_size and limit 1 or more; got {shots}, {batch_size}, "
            f"{limit}"
        )
    with _at_depth(model, depth), quiet() as cut:
        manager = _task_manager(include_path)
        parts = [part for name in tasks for part in _BENCHMARKS[name].parts]
        loaded = {part: _load_tasks(manager, part, shots) for part in parts}
        samples = None if limit is None else _choose_documents(tasks, loaded, limit)
        low = torch.bfloat16 if is_low(model.device, "auto") else None
        scored = _Finite(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=low
        )
        full = lm_eval.simple_evaluate(
            model=scored,
            tasks=[item for part in parts for item in _to_run(part, loaded[part], samples)],
            num_fewshot=shots,
            samples=samples,
            task_manager=manager,
        )
    rows = {name: _rows(_BENCHMARKS[name], full) for name in tasks}
    merged = tuple(_mean(name, found) for name, found in rows.items())
    return HarnessResult(
        tasks=merged,
        parts=tuple(row for found in rows.values() if len(found) > 1 for row in found),
        average=paper_average(merged),
        shots=shots,
        limit=limit,
        depth=depth,
        cut_requests=cut.count,
        full=full | {"depth": depth},
    )


@contextmanager
def _at_depth(model: Any, depth: Depth) -> Iterator[None]:
    """Forwards that name no depth have this one; None leaves the model's as it is. Raises
    ValueError for what cannot be had."""
    if depth is None:
        yield
        return
    if not isinstance(model, mor.hub.MoRForCausalLM):
        raise ValueError(f"depth goes with a mor model, not with a {type(model).__name__}")
    budget_of(model.model, depth)
    before, model.depth = model.depth, depth
    try:
        yield
    finally:
        model.depth = before


def paper_average(rows: Sequence[TaskResult]) -> float | None:
    """Mean score of the paper's six tasks, each counted once; None unless all six are there."""
    scores = {row.task: row.score for row in rows}
    return fmean(scores.values()) if scores.keys() == _BENCHMARKS.keys() else None


def _rows(benchmark: _Benchmark, full: dict[str, Any]) -> list[TaskResult]:
    return [_row(part, benchmark.metric, full["results"][part]) for part in benchmark.parts]


def _row(part: str, metric: str, found: dict[str, Any]) -> TaskResult:
    stderr = found.get(f"{metric}_stderr,none")
    return TaskResult(
        task=part,
        metric=metric,
        score=float(found[f"{metric},none"]),
        stderr=float(stderr) if isinstance(stderr, float) else None,
        items=int(found["sample_len"]),
    )


def _mean(name: str, parts: list[TaskResult]) -> TaskResult:
    return TaskResult(
        task=name,
        metric=parts[0].metric,
        score=fmean(row.score for row in parts),
        stderr=parts[0].stderr if len(parts) == 1 else None,
        items=sum(row.items for row in parts),
    )


# Tasks and the documents they are asked about


def _task_manager(include_path: Path | None) -> TaskManager:
    """Finds lm-eval's files of these benchmarks, and the caller's, which take their place.

    Warns of files without a task: lm-eval passes over them, and would read its own in their place.
    """
    folders = [STOCK_TASKS / benchmark.folder for benchmark in _BENCHMARKS.values()]
    if include_path is None:
        return TaskManager(include_defaults=False, include_path=folders)
    files = set(include_path.rglob("*.yaml"))
    if not files:
        raise ValueError(f"{include_path} is not a folder with task files (.yaml) for lm-eval")
    manager = TaskManager(include_defaults=False, include_path=[*folders, include_path])
    if unread := files - {entry.yaml_path for entry in manager.task_index.values()}:
        names = ", ".join(sorted(str(file) for file in unread))
        warnings.warn(f"lm-eval finds no task in {names}", stacklevel=3)
    return manager


def _load_tasks(manager: TaskManager, part: str, shots: int) -> list[Task]:
    """lm-eval's own tasks: one, or MMLU's subjects in the order of their names."""
    spec: str | dict[str, Any] = part
    if part in _CHANGES:  # lm-eval applies changes to its own tasks only inside a group
        spec = {"group": f"of {part}", "task": [{"task": part, **_CHANGES[part]}]}
    try:
        with asking_the_hub(part):
            found = manager.load([spec])["tasks"]
    except (OSError, DatasetsError) as error:
        raise ValueError(
            f"the data of {part} could not be read ({error}). Without the Hugging Face hub, give "
            "task files that read local data: --include-path DIR"
        ) from error
    for name, task in found.items():
        # Otherwise lm-eval would silently ask without examples.
        if shots and task.config.num_fewshot == 0:
            raise ValueError(
                f"the task file of {name} says num_fewshot: 0, so it cannot be asked with {shots} "
                "examples; use --shots 0"
            )
    return [found[name] for name in sorted(found)]


def _choose_documents(
    names: Sequence[str], loaded: dict[str, list[Task]], limit: int
) -> dict[str, list[int]]:
    """Indices of the documents to ask about, by lm-eval task; tasks without any are absent."""
    chosen: dict[str, list[int]] = {}
    for name in names:
        parts = _BENCHMARKS[name].parts
        if limit < len(parts):
            raise ValueError(
                f"{name} is the mean of {len(parts)} sets; it needs a limit of at least "
                f"{len(parts)}"
            )
        for place, part in enumerate(parts):
            share = limit // len(parts) + (place < limit % len(parts))
            sizes = {task.task_name: len(task.eval_docs) for task in loaded[part]}
            chosen |= evenly_over(sizes, share)
    return chosen


def evenly_over(sizes: dict[str, int], count: int) -> dict[str, list[int]]:
    """``count`` items spread evenly over lists that follow each other: indices by list. A list
    without any is left out."""
    items = [(name, index) for name, size in sizes.items() for index in range(size)]
    chosen: dict[str, list[int]] = defaultdict(list)
    for place in evenly_spaced(count, len(items)):
        name, index = items[place]
        chosen[name].append(index)
    return dict(chosen)


def _to_run(
    part: str, tasks: list[Task], samples: dict[str, list[int]] | None
) -> list[Task | Group]:
    """The tasks with documents to ask about; MMLU's in a group that weights them by size."""
    kept = [task for task in tasks if samples is None or task.task_name in samples]
    if part != "mmlu":
        return list(kept)
    group = Group(part, aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=True)])
    for task in kept:
        group.add(task)
    return [group]


# Models


def load_model(checkpoint: str | Path, *, device: str = "auto") -> tuple[Any, Any]:
    """A transformers model and tokenizer from a mor run or checkpoint, a transformers directory, a
    hub name or a .gguf file. Weights are fp32 on CPUs, elsewhere as they were saved; there forwards
    make their products in bfloat16, and a router decides in the precision of its weights."""
    place = pick_device(device)
    name, given = _locate(str(checkpoint))
    settings: dict[str, Any] = given | {"trust_remote_code": False}  # and no question about it
    with without_bars(), asking_the_hub(name):
        dtype = torch.float32 if place.type == "cpu" else "auto"
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **settings
        )
        model, found = loaded
        _check_loaded(name, found)
        return model.to(place).eval(), AutoTokenizer.from_pretrained(name, **settings)


def _check_loaded(name: str, found: dict[str, Any]) -> None:
    """Raise ValueError for tensors that the model lacks, or that transformers left out."""
    kinds = {"missing": "missing_keys", "left over": "unexpected_keys"}
    kinds["of another shape"] = "mismatched_keys"
    problems = [
        f"{kind}: {', '.join(sorted(map(str, found[key]))[:6])}"
        for kind, key in kinds.items()
        if found[key]
    ]
    if problems:
        raise ValueError(f"the weights of {name} are not those of its model; {'; '.join(problems)}")


def _locate(checkpoint: str) -> tuple[str, dict[str, str]]:
    path = Path(checkpoint)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        return str(path.parent), {"gguf_file": path.name}
    if path.exists() or checkpoint.startswith((".", os.sep)):
        folder = resolve(path)
        check(folder)
        return str(folder), {}
    return checkpoint, {}
