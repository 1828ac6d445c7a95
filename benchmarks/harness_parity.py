"""The same lm-eval items through two checkpoints, such as a Llama and what `mor convert` makes of
it.

    mor convert smol smol-llama --to llama
    python benchmarks/harness_parity.py smol-llama smol --task-data DIR --limit 50

DIR: flat copies of the benchmarks (see flat_tasks.py); without it lm-eval reads the hub. Prints
both scores of every task and the largest difference of a log-likelihood; JSON in the last line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import datasets
import torch
from flat_tasks import write_tasks

from mor.evaluation.harness import TASK_NAMES, HarnessResult, evaluate_tasks, load_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--task-data", type=Path)
    parser.add_argument("--tasks", default=",".join(TASK_NAMES))
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--batch-sizes", type=int, nargs=2, default=[8, 8])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        include_path = None
        if options.task_data:
            include_path = Path(folder, "tasks")
            write_tasks(options.task_data, include_path)
            datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        found = [
            evaluate_tasks(
                *load_model(checkpoint),
                options.tasks.split(","),
                limit=options.limit,
                batch_size=batch_size,
                include_path=include_path,
            )
            for checkpoint, batch_size in zip(
                (options.first, options.second), options.batch_sizes, strict=True
            )
        ]
    rows = []
    print(f"{'task':12} {'items':>6} {'first':>8} {'second':>8}")
    for a, b in zip(found[0].tasks, found[1].tasks, strict=True):
        rows.append(
            {
                "task": a.task,
                "metric": a.metric,
                "items": a.items,
                "first": a.score,
                "second": b.score,
            }
        )
        print(f"{a.task:12} {a.items:6} {a.score:8.4f} {b.score:8.4f}")
    difference = max(abs(x - y) for x, y in zip(*map(loglikelihoods, found), strict=True))
    print(f"largest difference of a log-likelihood: {difference:.2e}")
    averages = [result.average for result in found]
    print(
        json.dumps(
            {
                "rows": rows,
                "averages": averages,
                "largest_difference": difference,
                "limit": options.limit,
            }
        )
    )


def loglikelihoods(result: HarnessResult) -> list[float]:
    """Of every request, in a fixed order."""
    samples = result.full["samples"]
    answers = [(name, s["doc_id"], s["resps"]) for name in samples for s in samples[name]]
    return [
        float(response[0][0])
        for _, _, responses in sorted(answers, key=lambda a: a[:2])
        for response in responses
    ]


if __name__ == "__main__":
    main()
