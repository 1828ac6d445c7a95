"""mor sweep"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from mor.cli.command import Command
from mor.settings import PositiveInt, Seed
from mor.studies.settings import Workers

if TYPE_CHECKING:
    from mor.studies.study import Run, Study


class Sweep(Command):
    """Run a study: its grid of runs, then tables and figures. Finished runs are kept, interrupted
    ones go on; a run that fails, or whose losses over depth cannot be measured, is listed with its
    reason, stops no other, and makes the exit code 1."""

    study: Positional[Path | None] = None
    """Study file (TOML); studies/ has ready ones."""
    size: Path | None = None
    """Size file in place of the one that the study names, such as studies/sizes/paper.toml."""
    out: Path | None = None
    """Folder of the study. Default: runs/studies/NAME, with another size NAME-SIZE."""
    workers: Annotated[Workers, arg(name="")] = field(default_factory=Workers)
    variants: tuple[str, ...] = ()
    """Only these variants of the study."""
    seeds: tuple[Seed, ...] = ()
    """Only these seeds."""
    dry_run: bool = False
    """Show what would run, and what is finished already."""
    report: bool = False
    """Only write the tables and figures of what is finished."""
    fit: str | None = None
    """Fit published losses and run nothing: 'paper', or a TOML file like mor/studies/paper.toml."""
    resamples: PositiveInt = 1000
    """Of the bootstrap behind the intervals of fits."""

    def without_effect(self) -> Iterator[tuple[str, str]]:
        runs = "jobs threads gpus cluster partition hours"
        if self.fit is not None:
            yield f"size variants seeds dry_run report {runs}", "with --fit, which runs nothing"
        if self.dry_run:
            yield f"report resamples {runs}", "with --dry-run"
        if self.report:
            yield f"variants seeds {runs}", "with --report, which runs nothing"
        if self.workers.gpus and not self.workers.cluster:
            yield "jobs", "with --gpus, which runs one on each"
        if not self.workers.cluster:
            yield "partition hours", "without --cluster"

    def run(self, console: Console) -> None:
        if self.fit is not None:
            if self.study is not None:
                raise ValueError(f"--fit runs no study: leave out {self.study}")
            self._fit(self.fit, console)
            return
        if self.study is None:
            raise ValueError("name a study file such as studies/gate.toml, or give --fit paper")
        from mor.studies.launch import run_study
        from mor.studies.report import report
        from mor.studies.study import load_study, variants_named

        study = load_study(self.study, size=self.size)
        chosen = variants_named(study, self.variants) if self.variants else study
        chosen = replace(chosen, seeds=self.seeds) if self.seeds else chosen
        name = self.study.stem + (f"-{self.size.stem}" if self.size else "")
        out = self.out or Path("runs/studies") / name
        console.print(f"{study.title} → {out}", highlight=False, soft_wrap=True)
        if self.dry_run:
            _show_plan(chosen, out, console)
            return
        outcomes = [] if self.report else run_study(chosen, out, self.workers, console)
        found = report(study, out, console, resamples=self.resamples)
        console.print(f"written: {found}", highlight=False, soft_wrap=True)
        if found.unmeasured or any(outcome.status == "failed" for outcome in outcomes):
            raise SystemExit(1)

    def _fit(self, source: str, console: Console) -> None:
        from mor.studies.published import PAPER, load_published
        from mor.studies.report import Output, report_scaling

        path = PAPER if source == "paper" else Path(source)
        found = load_published(path)
        out = self.out or Path("runs/studies") / f"fit-{path.stem}"
        what = f"{len(found.points)} losses, noise {found.noise:g} nats"
        console.print(f"{found.title}: {what}", highlight=False)
        fitted: dict[str, Any] = dict(noise=found.noise, resamples=self.resamples)
        with Output(out) as written:
            written.summary({"fit": found.title, "points": what})
            size = "unique parameters without embeddings"
            report_scaling(found.points, written, console, size_name=size, **fitted)
        console.print(f"written: {written}", highlight=False, soft_wrap=True)


def _show_plan(study: Study, out: Path, console: Console) -> None:
    from mor.studies.study import RESULT, main_runs, tuning_runs

    made = Table("", "runs", "finished", "steps", "FLOPs", title_justify="left")
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in [
        *tuning_runs(study, out),
        *(r for stage in main_runs(study, out, {}) for r in stage),
    ]:
        groups.setdefault((run.stage, run.row), []).append(run)
    for (stage, row), runs in groups.items():
        done = sum((Path(run.config.out) / RESULT).is_file() for run in runs)
        steps, flops = ({f(run) for run in runs} for f in (_steps, _flops))
        cells = (
            " to ".join(dict.fromkeys((f"{min(x):,.3g}", f"{max(x):,.3g}"))) for x in (steps, flops)
        )
        made.add_row(f"{row} ({stage})", str(len(runs)), str(done), *cells)
    total = sum(_flops(run) for runs in groups.values() for run in runs)
    console.print(made, f"{total:.3g} training FLOPs in all", highlight=False)


def _steps(run: Run) -> float:
    from mor.training.config import total_steps

    return total_steps(run.config) - run.branch_step


def _flops(run: Run) -> float:
    from mor.studies.launch import flops_of

    return flops_of(run)
