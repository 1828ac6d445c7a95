"""What a study's numbers say: paired differences with intervals, and whether depth pays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from mor.statistics import paired
from mor.studies.study import Study

Runs = dict[int, dict[str, Any]]  # by seed
OPTIONAL = (
    "topk_nll_noncausal",
    "answers_right",
    "dead_positions",
    "agreement",
    "max_violation",
    "depth_entropy",
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of a study's table. NLL in nats, causal; difference: against the reference row, seed by
    seed.

    dead_positions to depth_entropy: the router's health in training, see Router.health.
    full_depth_nll, best_depth_nll: where the study measures depths; see depth_report.py.
    """

    row: str
    seeds: int
    nll: float
    nll_sd: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    mean_depth: float
    topk_nll_noncausal: float | None
    answers_right: float | None
    dead_positions: float | None
    agreement: float | None
    max_violation: float | None
    depth_entropy: float | None
    params: int
    tokens: float
    train_flops: float
    train_s: float
    lr: float
    full_depth_nll: float | None = None
    best_depth_nll: float | None = None
    best_depth: str | None = None


def by_row(rows: Iterable[dict[str, Any]]) -> dict[str, Runs]:
    """Runs by row (with its budget, if there are several) and seed."""
    found: dict[str, Runs] = {}
    for run in rows:
        found.setdefault(line_name(run), {})[run["seed"]] = run
    return found


def line_name(run: dict[str, Any]) -> str:
    """The row, and the budget if there are several."""
    row: str = run["row"]
    return f"{row}, {run['budget']:g} FLOPs" if run["budget"] else row


def lines(study: Study, rows: Iterable[dict[str, Any]]) -> list[Line]:
    """The study's table, in the order of its file. rows: finished runs that count."""
    grouped = by_row(rows)
    made = []
    for name, runs in sorted(grouped.items(), key=lambda item: _place(study, item[1])):
        nll = {seed: run["validation_nll"] for seed, run in runs.items()}
        peer = grouped.get(reference_of(study, next(iter(runs.values()))) or "")
        difference = None
        if peer is not None and peer is not runs:
            difference = paired(nll, {seed: run["validation_nll"] for seed, run in peer.items()})
        some = list(runs.values())
        made.append(
            Line(
                row=name,
                seeds=len(runs),
                nll=fmean(nll.values()),
                nll_sd=stdev(nll.values()) if len(nll) > 1 else None,
                difference=difference.mean if difference else None,
                difference_low=difference.low if difference else None,
                difference_high=difference.high if difference else None,
                mean_depth=fmean(run["mean_depth"] for run in some),
                **_optional(some),
                params=some[0]["params"],
                tokens=fmean(run["tokens"] for run in some),
                train_flops=fmean(run["train_flops"] for run in some),
                train_s=fmean(run["train_s"] for run in some),
                lr=some[0]["config_optim_lr"],
            )
        )
    return made


def _place(study: Study, runs: dict[int, dict[str, Any]]) -> tuple[int, float]:
    run = next(iter(runs.values()))
    order = list(study.variants)
    return (order.index(run["variant"]) if run["variant"] in order else len(order)), run[
        "budget"
    ] or 0.0


def _optional(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {name: _mean(run.get(name) for run in runs) for name in OPTIONAL}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def reference_of(study: Study, run: dict[str, Any]) -> str | None:
    """The reference variant's row at the same place on every axis."""
    if not study.reference:
        return None
    return line_name({**run, "row": run["row"].replace(run["variant"], study.reference, 1)})


def depth_verdict(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """Whether depth pays at this size, in words computed from the numbers."""
    control = study.depth_pays
    if not (control.deep and control.shallow):
        return "This study has no control, so it does not show whether depth pays at its size."
    grouped = by_row(rows)
    verdicts = []
    for name, deep in grouped.items():
        if next(iter(deep.values()))["variant"] != control.deep:
            continue
        shallow = grouped.get(name.replace(control.deep, control.shallow, 1), {})
        verdicts.append(_verdict(name, shallow, deep, control.margin))
    return "\n".join(verdicts) or "The runs that show whether depth pays have not finished yet."


def _verdict(name: str, shallow: Runs, deep: Runs, margin: float) -> str:
    found = paired(
        *({s: run["validation_nll"] for s, run in runs.items()} for runs in (shallow, deep))
    )
    if found is None:
        return (
            f"{name}: the one-pass control has not finished on the same seeds, so nothing is known "
            "about depth yet."
        )
    once = "the same unique layers applied once"
    if found.low is None or found.high is None:
        return (
            f"{name}: {once} are worse by {found.mean:+.3f} nats on one seed: no evidence, n = 1."
        )
    figures = f"{found.mean:+.3f} nats [{found.low:+.3f}, {found.high:+.3f}], n = {found.count}"
    if found.low > margin:
        return f"{name}: depth pays: {once} are worse by {figures}."
    if found.low <= 0 <= found.high:
        said = f"no significant difference; {once}: {figures}"
    else:
        said = f"{once} differ by {figures}; the study asks for more than {margin:g}"
    return (
        f"{name}: depth does not clearly pay: {said}. So the study says nothing about routing at "
        "this size: train larger models, longer, or on a harder task."
    )
