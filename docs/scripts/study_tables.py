"""What a study found, made of its result files, so that a page cannot say anything else.

Question, command, control, rows, curves over depth and claims come from the newest
``benchmarks/results/studies-DATE/NAME/``. ``refresh.py`` puts them into the pages.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path("benchmarks/results")
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
    folder = folder_of(study)
    summary = json.loads((ROOT / folder / "summary.json").read_text())
    rows = read(folder / file)
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


def folder_of(study: str) -> Path:
    """The newest results of a study, from the root of the project."""
    found = sorted(path for path in (ROOT / RESULTS).glob(f"studies-*/{study}") if path.is_dir())
    if not found:
        raise ValueError(f"no results of {study} in {RESULTS}")
    return found[-1].relative_to(ROOT)


def read(file: Path) -> list[dict[str, str]]:
    with (ROOT / file).open(newline="") as content:
        return list(csv.DictReader(content))


def depths(study: str) -> str:
    """NLL of every row at every mean depth; what was spent is told where it is another."""
    file = folder_of(study) / "depths.csv"
    lines = read(file)
    names = list(dict.fromkeys(line["depth"] for line in lines))
    names.sort(key=lambda name: float({"full": "inf", "best": "inf"}.get(name, name)))
    header = [*(n if n[0].isdigit() else n.capitalize() for n in names), "Best is at"]
    made = [f"| Row | {' | '.join(header)} |", "| --- |" + " ---: |" * len(header)]
    for row in dict.fromkeys(line["row"] for line in lines):
        at = {line["depth"]: line for line in lines if line["row"] == row}
        cells = [_with_spent(at[name]) if name in at else "–" for name in names]
        made.append(f"| {row} | {' | '.join(cells)} | {at['best']['at']} |")
    return "\n".join([f"- File: `{file}`\n", *made])


def _with_spent(line: Mapping[str, str]) -> str:
    spent, asked = float(line["mean_depth"]), line["depth"]
    off = asked not in ("full", "best") and abs(spent / float(asked) - 1) > 0.03
    return number(line["nll"]) + (f" ({spent:.2f})" if off else "")


def claims(study: str) -> str:
    """What the study's file wanted to show, and whether it does."""
    file = folder_of(study) / "claims.csv"
    columns = ("Claim", "Against", "Mean depth", "n", "Difference", "95% interval", "Bound", "")
    made = [f"| {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]
    for line in read(file):
        ends = [line[name] for name in ("value", "low", "high")]
        if line["against"] == "its budget":
            value, low, high = (f"{float(end):+.1%}" if end else "–" for end in ends)
            within, bound = f"{low} to {high} by seed", f"{float(line['bound']):.0%} in the mean"
        else:
            value, low, high = (number(end, signed=True) for end in ends)
            within, bound = f"[{low}, {high}]", f"{float(line['bound']):.3f}"
        who = line["against"] or "the depth before"
        cells = (line["claim"], who, line["depth"], line["seeds"], value, within, bound)
        made.append(f"| {' | '.join(cells)} | {line['verdict']} |")
    return "\n".join([f"- File: `{file}`\n", *made])


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    over_depth = any(row.get("best_depth_nll") for row in rows)
    columns = COLUMNS + ("Full depth", "Best depth") * over_depth
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
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
        if over_depth:
            best = f"{number(row['best_depth_nll'])} at {row['best_depth']}"
            cells += (number(row["full_depth_nll"]), best)
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
