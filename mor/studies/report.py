"""Tables and figures of a study's finished runs; ``mor report`` puts them on one page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mor.analysis import report as analysis
from mor.analysis.report import SUMMARY
from mor.analysis.style import save
from mor.statistics import paired
from mor.studies import compare, figures, scaling
from mor.studies.captions import CAPTIONS
from mor.studies.results import TABLE, collect, finished, tuned_rates, write_table
from mor.studies.study import Study


@dataclass(frozen=True, kw_only=True)
class Exit:
    """A policy by which tokens of a trained variant exit early; means over seeds, NLL in nats."""

    row: str
    policy: str
    seeds: int
    mean_depth: float
    nll: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None


def report(study: Study, folder: Path, console: Console, *, resamples: int = 1000) -> None:
    """Write FOLDER/results.sqlite, summary.json, tables/*.csv, figures/*.png and *.svg, and print
    what they say."""
    rows = collect(folder)
    if not rows:
        raise ValueError(f"{folder} holds no runs yet; start the study without --report")
    write_table(rows, folder / TABLE)
    runs = finished(rows, "main", "branch")
    verdict = compare.depth_verdict(study, runs)
    write_summary(
        folder, {"study": study.title, "question": study.question, "does depth pay?": verdict}
    )
    console.print(verdict, highlight=False, soft_wrap=True)
    _report_rows(study, runs, folder, console)
    if found := exits(runs):
        _write_csv(found, folder / "tables" / "exits.csv")
        console.print(_table(found, "Exits chosen after training, against random ones"))
    if study.budgets:
        size = "unique parameters without embeddings"
        points = scaling.points_of(runs, lambda run: run["params"])
        report_scaling(points, folder, console, size_name=size, resamples=resamples)
    for row in rows:
        if row["status"] == "failed":
            console.print(
                f"failed: {row['path']}: {row['reason']}", highlight=False, soft_wrap=True
            )
        if row["status"] == "finished" and not math.isfinite(row["validation_nll"]):
            console.print(
                f"left out, its NLL is not a number: {row['path']}", highlight=False, soft_wrap=True
            )
    _print_edges(study, rows, console)


def write_summary(folder: Path, texts: dict[str, str]) -> None:
    """The top of ``mor report``'s page. Removes the tables and figures of an earlier report."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in CAPTIONS:
        for old in (*folder.glob(f"tables/{name}.csv"), *folder.glob(f"figures/{name}.*")):
            old.unlink()
    (folder / SUMMARY).write_text(
        json.dumps({name: text for name, text in texts.items() if text}, indent=2)
    )


def _report_rows(
    study: Study, runs: Sequence[dict[str, Any]], folder: Path, console: Console
) -> None:
    """The table of rows with what is measured on their routers, and its figures."""
    lines = compare.lines(study, runs)
    if not lines:
        return
    _write_csv(lines, folder / "tables" / "rows.csv")
    console.print(lines_table(study, lines))
    if any(line.agreement is not None or line.max_violation is not None for line in lines):
        console.print(_health_table(lines))
    console.print(
        "Parameters, tokens, FLOPs, times and learning rates: tables/rows.csv", highlight=False
    )
    if not study.budgets:  # with budgets: see isoflop
        _draw_rows(study, lines, compare.by_row(runs), folder / "figures")


def _draw_rows(
    study: Study, lines: Sequence[compare.Line], runs: figures.Runs, folder: Path
) -> None:
    control = study.depth_pays
    apart = {study.reference, control.deep, control.shallow}
    names = {name: next(iter(of_row.values()))["variant"] for name, of_row in runs.items()}
    drawn = figures.rows_figure(
        lines,
        runs,
        title=study.title,
        reference=study.reference,
        controls=[name for name, variant in names.items() if variant in apart],
    )
    save(drawn, folder, "rows")
    compared = study.reference or control.deep
    hops = figures.hops_figure(lines, runs, title=study.title, compared=compared)
    if hops is not None:
        save(hops, folder, "hops")


def _write_csv(found: Sequence[Any], path: Path) -> None:
    """Dataclasses of one kind as a table."""
    analysis.write_table([asdict(line) for line in found], path)


def _print_edges(study: Study, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Say where the best learning rate is at an end of its grid: the true one may lie beyond."""
    ends = (
        {f"{r:g}" for r in (min(study.tuning.rates), max(study.tuning.rates))}
        if study.tuning.rates
        else set()
    )
    edge = [
        f"{name} ({rate:g})"
        for name, rate in tuned_rates(rows, study.tuning.rates).items()
        if f"{rate:g}" in ends
    ]
    if edge:
        console.print(
            f"The best learning rate is at the end of its grid for {', '.join(edge)}.",
            highlight=False,
        )


def lines_table(study: Study, lines: Sequence[compare.Line]) -> Table:
    """No row is marked as best: an interval that holds 0 is no significant difference."""
    made = Table(
        title=f"{study.title}: causal validation NLL, nats; paired differences with 95% intervals"
    )
    made.title_justify = "left"
    made.add_column("", overflow="fold")
    topk, right = (
        any(getattr(x, n) is not None for x in lines)
        for n in ("topk_nll_noncausal", "answers_right")
    )
    heads = ["NLL", "seeds", f"against {study.reference or 'no reference'}", "depth"]
    for head in heads + ["top-k NLL (non-causal)"] * topk + ["right"] * right:
        made.add_column(head, justify="right")
    for x in lines:
        cells = [f"{x.nll:.4f}", str(x.seeds), _interval(x), f"{x.mean_depth:.2f}"]
        made.add_row(
            x.row,
            *cells,
            *[_number(x.topk_nll_noncausal)] * topk,
            *[_number(x.answers_right, 3)] * right,
        )
    return made


def _health_table(lines: Sequence[compare.Line]) -> Table:
    made = Table(title="Routers at the end of training (top-k selection)", title_justify="left")
    names = ("dead_positions", "agreement", "max_violation", "depth_entropy")
    for name in ("", *(n.replace("_", " ") for n in names)):
        made.add_column(name, justify="right" if name else "left")
    for line in lines:
        if line.depth_entropy is not None:
            made.add_row(line.row, *(_number(getattr(line, name), 3) for name in names))
    return made


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(line: compare.Line) -> str:
    if line.difference is None:
        return "–"
    if line.difference_low is None:
        return f"{line.difference:+.3f} (n = 1)"
    return f"{line.difference:+.3f} [{line.difference_low:+.3f}, {line.difference_high:+.3f}]"


def exits(runs: Sequence[dict[str, Any]]) -> list[Exit]:
    """Policies at equal mean depth, compared with random exits seed by seed."""
    found = []
    for name, seeds in compare.by_row(run for run in runs if run.get("exits")).items():
        for policy in ("random", "confidence", "oracle"):
            given = {seed: run["exits"][policy] for seed, run in seeds.items()}
            nll = {seed: value["nll"] for seed, value in given.items()}
            base = {seed: run["exits"]["random"]["nll"] for seed, run in seeds.items()}
            difference = paired(nll, base) if policy != "random" else None
            found.append(
                Exit(
                    row=name,
                    policy=policy,
                    seeds=len(seeds),
                    mean_depth=sum(v["mean_depth"] for v in given.values()) / len(given),
                    nll=sum(nll.values()) / len(nll),
                    difference=difference.mean if difference else None,
                    difference_low=difference.low if difference else None,
                    difference_high=difference.high if difference else None,
                )
            )
    return found


def report_scaling(
    points: Sequence[scaling.Point],
    folder: Path,
    console: Console,
    *,
    size_name: str,
    noise: float = 0.0,
    resamples: int = 1000,
) -> None:
    """IsoFLOP fits: best sizes, their paths, the recurrence law. noise: see scaling.optima."""
    best = scaling.optima(points, noise=noise, resamples=resamples)
    slopes = scaling.paths(points, noise=noise, resamples=resamples)
    laws = _laws(points, console, noise=noise, resamples=max(1, resamples // 5))
    titles = {
        "optima": f"Best size for a budget: {size_name}",
        "paths": "Slopes of the optimal paths",
    }
    titles |= {"recurrence_law": "Recurrence law"}
    for name, found in (("optima", best), ("paths", slopes), ("recurrence_law", laws)):
        if found:
            _write_csv(found, folder / "tables" / f"{name}.csv")
            console.print(_table(found, titles[name]))
    if points:
        save(
            figures.isoflop_figure(points, best, size_name=size_name), folder / "figures", "isoflop"
        )
    if best:
        save(figures.paths_figure(best, size_name=size_name), folder / "figures", "optimal_paths")


def _laws(
    points: Sequence[scaling.Point], console: Console, *, noise: float, resamples: int
) -> list[scaling.RecurrenceLaw]:
    """One for each family that loops; prints why if there is none."""
    found = []
    for family in dict.fromkeys(p.family for p in points if p.loops > 1):
        try:
            found.append(
                scaling.recurrence_law(points, family=family, noise=noise, resamples=resamples)
            )
        except ValueError as error:
            console.print(f"no recurrence law: {error}", highlight=False)
    return found


def _table(found: Sequence[Any], title: str) -> Table:
    """Dataclasses of one kind; bounds stand beside what they bound."""
    made = Table(title=f"{title}; 95% intervals", title_justify="left")
    rows = [asdict(line) for line in found]
    names = [name for name in rows[0] if not name.endswith(("_low", "_high"))]
    for name in names:
        words = isinstance(rows[0][name], str)
        made.add_column(
            name.replace("_", " "), justify="left" if words else "right", overflow="fold"
        )
    for row in rows:
        made.add_row(*(_bounded(row, name) for name in names))
    return made


def _bounded(row: dict[str, Any], name: str) -> str:
    stem = name.removesuffix("_slope")
    low, high = (row.get(f"{stem}_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return _cell(row[name])
    if math.isnan(low) or math.isnan(high):
        return f"{_cell(row[name])} [none]"
    return f"{_cell(row[name])} [{_cell(low)}, {_cell(high)}]"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float | int):
        return str(value)
    if isinstance(value, int) or math.isnan(value):
        return str(value)
    rounded = float(f"{value:.3g}")
    if abs(rounded) >= 1e15:
        return f"{value:.3g}"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= size:
            return f"{rounded / size:.3g}{unit}"
    return f"{rounded:g}" if abs(rounded) >= 1 else f"{value:.3f}"
