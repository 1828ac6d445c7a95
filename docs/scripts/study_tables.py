"""What a study found, made of its result files, so that a page cannot say anything else.

Question, command, control and rows come from ``benchmarks/results/studies-2026-11-25/NAME/``.
``refresh.py`` puts them into the pages.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path("benchmarks/results/studies-2026-11-25")
COLUMNS = (
    "Row",
    "n",
    "NLL, nats",
    "Difference",
    "95% interval",
    "Verdict",
    "Mean depth",
    "Top-k NLL (non-causal)",
    "Training FLOPs",
)


def section(study: str, file: str = "rows.csv") -> str:
    """Markdown for a study. file: the table in its folder."""
    folder = RESULTS / study
    summary = json.loads((ROOT / folder / "summary.json").read_text())
    with (ROOT / folder / file).open(newline="") as content:
        rows = list(csv.DictReader(content))
    reference = next(row["row"] for row in rows if not row["difference"])
    return "\n".join(
        [
            f"{summary.get('question', '')}\n",
            f"- Command: `mor sweep studies/{study}.toml`",
            f"- File: `{folder / file}`",
            f"- Control: {summary['does depth pay?']}",
            f"- Differences are from the row *{reference}*, paired by seed.\n",
            *table(rows),
        ]
    )


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    for row in rows:
        cells = (
            row["row"],
            row["seeds"],
            number(row["nll"]),
            number(row["difference"], signed=True),
            interval(row),
            verdict(row),
            number(row["mean_depth"], digits=2),
            number(row["topk_nll_noncausal"]),
            f"{float(row['train_flops']):.2e}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def number(text: str, *, digits: int = 3, signed: bool = False) -> str:
    return f"{float(text):{'+' if signed else ''}.{digits}f}" if text else "–"


def interval(row: Mapping[str, str]) -> str:
    if not row["difference"]:
        return "–"
    low, high = (number(row[f"difference_{end}"], signed=True) for end in ("low", "high"))
    return f"[{low}, {high}]"


def verdict(row: Mapping[str, str]) -> str:
    """In words: whether the 95% interval of the difference leaves out 0."""
    if not row["difference"]:
        return "reference"
    if float(row["difference_low"]) <= 0 <= float(row["difference_high"]):
        return f"no significant difference, n = {row['seeds']}"
    return "lower NLL" if float(row["difference"]) < 0 else "higher NLL"
