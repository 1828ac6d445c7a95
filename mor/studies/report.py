"""Tables and figures of a study's finished runs; ``mor report`` puts them on one page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from mor.analysis import report as analysis
from mor.analysis.report import SUMMARY
from mor.analysis.style import save
from mor.files import write_json
from mor.progress import ProgressBar
from mor.statistics import paired
from mor.studies import compare, depth_report, figures, scaling
from mor.studies.captions import CAPTIONS
from mor.studies.depths import measure_missing, read_curves
from mor.studies.results import TABLE, collect, finished, tuned_rates, write_tables
from mor.studies.study import Study, curve_asked


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


class Output:
    """Files of a report. Those of an earlier one go only when all of these are there.

    Within the block they are written; an error in it leaves every file of the earlier report.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Path] = []
        self.unmeasured: dict[Path, str] = {}
        """Runs whose losses over depth could not be measured, and why."""

    def __enter__(self) -> Output:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed is not None:
            return
        for name in CAPTIONS:
            for old in (
                *self.folder.glob(f"tables/{name}.csv"),
                *self.folder.glob(f"figures/{name}.*"),
            ):
                if old not in self.files:
                    old.unlink()

    def __str__(self) -> str:
        """What was written, files in folders by their folder."""
        parts = (file.relative_to(self.folder).parts for file in self.files)
        names = dict.fromkeys(first + "/" * bool(more) for first, *more in parts)
        return f"{self.folder}/{', '.join(names)}"

    def database(self, runs: Sequence[dict[str, Any]], depths: Sequence[dict[str, Any]]) -> None:
        write_tables(self._new(TABLE), runs=runs, depths=depths)

    def summary(self, texts: dict[str, str]) -> None:
        """The top of ``mor report``'s page."""
        write_json(self._new(SUMMARY), {name: text for name, text in texts.items() if text})

    def table(self, name: str, found: Sequence[Any]) -> None:
        """Dataclasses of one kind."""
        analysis.write_table([asdict(line) for line in found], self._new(f"tables/{name}.csv"))

    def figure(self, name: str, drawn: Figure) -> None:
        save(drawn, self.folder / "figures", name)
        for ending in ("png", "svg"):
            self._new(f"figures/{name}.{ending}")

    def _new(self, name: str) -> Path:
        self.files.append(self.folder / name)
        return self.files[-1]


def report(study: Study, folder: Path, console: Console, *, resamples: int = 1000) -> Output:
    """Write FOLDER/results.sqlite, summary.json, tables/*.csv, figures/*.png and *.svg, as far as
    the finished runs have something for them, and print what they say."""
    rows = collect(folder)
    if not rows:
        raise ValueError(f"{folder} holds no runs yet; start the study without --report")
    runs = finished(rows, "main", "branch")
    verdict = compare.depth_verdict(study, runs)
    unmeasured = _measure_depths(study, runs, console)
    depths = depth_report.rows_of(study, runs)
    claims = depth_report.judge(study, depths)
    judged = depth_report.verdicts(claims)
    with Output(folder) as out:
        out.unmeasured = unmeasured
        out.database(rows, depth_report.points_of(depths))
        about = {"study": study.title, "question": study.question, "does depth pay?": verdict}
        out.summary(about | judged)
        console.print(verdict, highlight=False, soft_wrap=True)
        depth_lines = depth_report.depth_lines(study, depths)
        _report_rows(study, runs, depth_lines, out, console)
        if depth_lines:
            _report_depths(study, depth_lines, out, console)
        if claims:
            out.table("claims", claims)
            console.print(_table(claims, "Claims"))
            for name, said in judged.items():
                console.print(f"{name}: {said}", highlight=False, soft_wrap=True)
        if found := exits(runs):
            out.table("exits", found)
            console.print(_table(found, "Exits chosen after training, against random ones"))
        if study.budgets:
            size = "unique parameters without embeddings"
            points = scaling.points_of(runs, lambda run: run["params"])
            report_scaling(points, out, console, size_name=size, resamples=resamples)
    _print_left_out(rows, console)
    for path, reason in out.unmeasured.items():
        console.print(f"no depths of {path}: {reason}", highlight=False, soft_wrap=True)
    _print_edges(study, rows, console)
    return out


def _measure_depths(
    study: Study, runs: Sequence[dict[str, Any]], console: Console
) -> dict[Path, str]:
    """Measure what the study asks for and was not measured; reasons where it failed."""
    asked = ((Path(run["path"]), curve_asked(study, run["variant"])) for run in runs)
    missing = [(p, curve) for p, curve in asked if curve and read_curves(p, curve) is None]
    if not missing:
        return {}
    done = 0
    with ProgressBar(console, f"depths of {len(missing)} runs", total=len(missing)) as bar:

        def update() -> None:
            nonlocal done
            done += 1
            bar.update(done)

        return measure_missing(missing, update)


def _print_left_out(rows: Sequence[dict[str, Any]], console: Console) -> None:
    for row in rows:
        if row["status"] == "failed":
            console.print(
                f"failed: {row['path']}: {row['reason']}", highlight=False, soft_wrap=True
            )
        if row["status"] == "finished" and not math.isfinite(row["validation_nll"]):
            console.print(
                f"left out, its NLL is not a number: {row['path']}", highlight=False, soft_wrap=True
            )


def _report_rows(
    study: Study,
    runs: Sequence[dict[str, Any]],
    depth_lines: Sequence[depth_report.DepthLine],
    out: Output,
    console: Console,
) -> None:
    """The table of rows with what is measured on their routers, and its figures."""
    at = {(line.row, line.depth): line for line in depth_lines}
    lines = [
        replace(
            line,
            full_depth_nll=at[line.row, "full"].nll,
            best_depth_nll=at[line.row, "best"].nll,
            best_depth=at[line.row, "best"].at,
        )
        if (line.row, "best") in at
        else line
        for line in compare.lines(study, runs)
    ]
    if not lines:
        return
    out.table("rows", lines)
    console.print(lines_table(study, lines))
    if any(line.agreement is not None or line.max_violation is not None for line in lines):
        console.print(_health_table(lines))
    console.print(
        "Parameters, tokens, FLOPs, times and learning rates: tables/rows.csv", highlight=False
    )
    if not study.budgets:  # with budgets: see isoflop
        _draw_rows(study, lines, compare.by_row(runs), out)


def _report_depths(
    study: Study, lines: Sequence[depth_report.DepthLine], out: Output, console: Console
) -> None:
    """Loss by row and depth, differences from the reference, and what each step is worth to it; the
    file has the steps of all rows."""
    out.table("depths", lines)
    depths = [*map(depth_report.name_of, study.depths), "full", "best"]
    what = {"": "causal NLL, nats (in brackets what is spent, where off by more than 3%)"}
    what["difference"] = f"difference from {study.reference}"
    what["step"] = "difference from the depth before"
    for name, title in what.items():
        shown = [line for line in lines if not name or getattr(line, name) is not None]
        if name == "step" and study.reference in {line.row for line in lines}:
            shown = [line for line in shown if line.row == study.reference]
        if shown:
            made = Table(title=f"By mean depth: {title}", title_justify="left")
            made.add_column("", overflow="fold")
            some = [d for d in depths if any(line.depth == d for line in shown)]
            for depth in some:
                made.add_column(depth, justify="right", overflow="fold")
            for row in dict.fromkeys(line.row for line in shown):
                mine = {line.depth: line for line in shown if line.row == row}
                made.add_row(row, *(_at_depth(mine.get(d), name) for d in some))
            console.print(made)
    if not study.budgets:
        out.figure("depths", figures.depths_figure(lines, title=study.title))


def _at_depth(line: depth_report.DepthLine | None, name: str) -> str:
    if line is None:
        return "–"
    if name:
        return _with_interval(*(getattr(line, name + end) for end in ("", "_low", "_high")))
    spent = f" ({line.mean_depth:.2f})" if line.is_far_off else ""
    return f"{line.nll:.4f}{spent}" + f" at {line.at}" * (line.depth == "best")


def _draw_rows(
    study: Study, lines: Sequence[compare.Line], runs: figures.Runs, out: Output
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
    out.figure("rows", drawn)
    compared = study.reference or control.deep
    hops = figures.hops_figure(lines, runs, title=study.title, compared=compared)
    if hops is not None:
        out.figure("hops", hops)


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
    topk, right, full = (
        any(getattr(x, n) is not None for x in lines)
        for n in ("topk_nll_noncausal", "answers_right", "full_depth_nll")
    )
    heads = ["NLL", "seeds", f"against {study.reference or 'no reference'}", "depth"]
    heads += ["full depth", "best depth"] * full
    for head in heads + ["top-k NLL (non-causal)"] * topk + ["right"] * right:
        made.add_column(head, justify="right")
    for x in lines:
        difference = _with_interval(x.difference, x.difference_low, x.difference_high)
        cells = [f"{x.nll:.4f}", str(x.seeds), difference, f"{x.mean_depth:.2f}"]
        best = f"{_number(x.best_depth_nll)} at {x.best_depth}" if x.best_depth else "–"
        made.add_row(
            x.row,
            *cells,
            *[_number(x.full_depth_nll), best] * full,
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


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "–"
    if low is None:
        return f"{value:+.3f} (n = 1)"
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


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
    out: Output,
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
            out.table(name, found)
            console.print(_table(found, titles[name]))
    if points:
        out.figure("isoflop", figures.isoflop_figure(points, best, size_name=size_name))
    if best:
        out.figure("optimal_paths", figures.paths_figure(best, size_name=size_name))


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
