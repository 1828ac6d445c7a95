"""What the depth curves of a study's runs say: lines of a table, and its claims, judged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from mor.statistics import MeanInterval, paired
from mor.studies.compare import by_row, reference_of
from mor.studies.depths import Point, read_curves
from mor.studies.study import Claim, Study, chosen_by, curve_asked

FAR_OFF = 0.03
"""What is spent is told where it lies further than this share from what was asked for."""
Depth = float | str
"""A mean depth, "full", or "best"."""
Verdict = Literal["holds", "does not hold", "not known"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Curves of a row by seed and depth. reference: the row that it is compared with, if any."""

    points: Mapping[int, Mapping[Depth, Point]]
    reference: str | None

    def at(self, depth: Depth) -> dict[int, Point]:
        """By seed, of those that have the depth. best: see :meth:`best`."""
        wanted = self.best() if depth == "best" else depth
        return {seed: points[wanted] for seed, points in self.points.items() if wanted in points}

    def nll(self, depth: Depth) -> dict[int, float]:
        return {seed: point["nll"] for seed, point in self.at(depth).items()}

    def depths(self) -> list[Depth]:
        """Those that a seed has, in order."""
        some_have = {depth for points in self.points.values() for depth in points}
        return sorted(some_have, key=lambda d: math.inf if d == "full" else float(d))

    def best(self) -> Depth:
        """The depth with the lowest mean NLL of those that all seeds have: one for all of them, as
        a user would set it."""
        shared = [d for d in self.depths() if len(self.at(d)) == len(self.points)]
        return min(shared, key=lambda depth: fmean(self.nll(depth).values()))


@dataclass(frozen=True, kw_only=True)
class DepthLine:
    """A row at a depth; NLL in nats, means over seeds, intervals of paired differences.

    at: what "best" is. mean_depth: spent; least_depth and most_depth: by a seed. difference: from
    the reference row at the same depth (best: at its own). step: from the depth before.
    """

    row: str
    depth: str
    at: str
    seeds: int
    mean_depth: float
    least_depth: float
    most_depth: float
    nll: float
    nll_sd: float | None
    bits_per_byte: float | None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    step: float | None = None
    step_low: float | None = None
    step_high: float | None = None

    @property
    def is_far_off(self) -> bool:
        """Whether what is spent is not what was asked for."""
        asked = self.at if self.depth == "best" else self.depth
        return asked != "full" and abs(self.mean_depth / float(asked) - 1) > FAR_OFF


@dataclass(frozen=True, kw_only=True)
class ClaimLine:
    """A claim at one depth. value: the mean paired difference in nats with its interval, or how far
    what is spent lies from the depth, as a share, with the seeds furthest below and above."""

    claim: str
    row: str
    against: str
    depth: str
    seeds: int
    value: float | None
    low: float | None
    high: float | None
    bound: float
    verdict: Verdict


def name_of(depth: Depth) -> str:
    return f"{depth:g}" if isinstance(depth, int | float) else str(depth)


def rows_of(study: Study, runs: Iterable[dict[str, Any]]) -> dict[str, Row]:
    """The measured rows, in the order of the study file; each with its choosers after it."""
    found: dict[str, Row] = {}
    order = list(study.variants)
    known = [run for run in runs if run["variant"] in order]
    known.sort(key=lambda run: (order.index(run["variant"]), run["budget"] or 0.0))
    for name, of_row in by_row(known).items():
        curves: dict[str, dict[int, dict[Depth, Point]]] = {}
        for seed, run in of_row.items():
            asked = curve_asked(study, run["variant"])
            measured = None if asked is None else read_curves(Path(run["path"]), asked)
            for chooser, points in (measured or {}).items():
                by_depth = {point["depth"]: point for point in points}
                curves.setdefault(chooser, {})[seed] = by_depth
        reference = reference_of(study, next(iter(of_row.values())))
        for chooser, by_seed in curves.items():
            row = chosen_by(name, chooser) if chooser else name
            found[row] = Row(points=by_seed, reference=reference if reference != row else None)
    return found


def points_of(rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Every row, seed and depth by itself."""
    return [
        {"row": name, "seed": seed, **point}
        for name, row in rows.items()
        for seed, by_depth in row.points.items()
        for point in by_depth.values()
    ]


def depth_lines(study: Study, rows: Mapping[str, Row]) -> list[DepthLine]:
    """Every row at every depth that was asked for, and that it has, then full and best."""
    found = []
    for name, row in rows.items():
        depths = [depth for depth in row.depths() if depth in (*study.depths, "full")]
        lines = [_line(name, row, depth, rows) for depth in [*depths, "best"]]
        numbers = [depth for depth in depths if depth != "full"]
        steps = {name_of(b): paired(row.nll(b), row.nll(a)) for a, b in pairwise(numbers)}
        found += [replace(line, **_bounds("step", steps.get(line.depth))) for line in lines]
    return found


def _line(name: str, row: Row, depth: Depth, rows: Mapping[str, Row]) -> DepthLine:
    points = list(row.at(depth).values())
    nll = [point["nll"] for point in points]
    spent = [point["mean_depth"] for point in points]
    bits = [point["bits_per_byte"] for point in points]
    peer = rows.get(row.reference or "")
    return DepthLine(
        row=name,
        depth=name_of(depth),
        at=name_of(row.best() if depth == "best" else depth),
        seeds=len(points),
        mean_depth=fmean(spent),
        least_depth=min(spent),
        most_depth=max(spent),
        nll=fmean(nll),
        nll_sd=stdev(nll) if len(nll) > 1 else None,
        bits_per_byte=None if None in bits else fmean(bits),
        **_bounds("difference", paired(row.nll(depth), peer.nll(depth)) if peer else None),
    )


def _bounds(name: str, found: MeanInterval | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def judge(study: Study, rows: Mapping[str, Row]) -> list[ClaimLine]:
    """The study's claims, a line for each depth."""
    return [line for claim in study.claims for line in _judged(claim, rows)]


def _judged(claim: Claim, rows: Mapping[str, Row]) -> list[ClaimLine]:
    if claim.spent_within is not None:
        return [_spent(claim, rows, depth, claim.spent_within) for depth in claim.depths]
    if claim.against:
        return [_against(claim, rows, depth) for depth in claim.depths]
    row = rows.get(claim.row) or Row(points={}, reference=None)
    steps = [(f"{name_of(a)} to {name_of(b)}", a, b) for a, b in pairwise(claim.depths)]
    return [_compared(claim, name, "", row.nll(b), row.nll(a)) for name, a, b in steps]


def _against(claim: Claim, rows: Mapping[str, Row], depth: Depth) -> ClaimLine:
    """Against the row with the lowest mean there; a row that is not there leaves it open."""
    others = {name: rows[name].nll(depth) for name in claim.against if name in rows}
    others = {name: nll for name, nll in others.items() if nll}
    complete = len(others) == len(claim.against)
    best = min(others, key=lambda name: fmean(others[name].values())) if complete else ""
    mine = rows[claim.row].nll(depth) if claim.row in rows else {}
    shown = best or " or ".join(claim.against)
    return _compared(claim, name_of(depth), shown, mine, others.get(best, {}))


def _compared(
    claim: Claim,
    depth: str,
    against: str,
    mine: Mapping[int, float],
    others: Mapping[int, float],
) -> ClaimLine:
    assert claim.below is not None
    found = paired(mine, others)
    high = found.high if found else None
    verdict: Verdict = "not known" if high is None else _verdict(high < claim.below)
    return ClaimLine(
        claim=claim.name,
        row=claim.row,
        against=against,
        depth=depth,
        seeds=found.count if found else 0,
        value=found.mean if found else None,
        low=found.low if found else None,
        high=high,
        bound=claim.below,
        verdict=verdict,
    )


def _spent(claim: Claim, rows: Mapping[str, Row], depth: Any, bound: float) -> ClaimLine:
    points = rows[claim.row].at(depth) if claim.row in rows else {}
    off = [point["mean_depth"] / depth - 1 for point in points.values()]
    return ClaimLine(
        claim=claim.name,
        row=claim.row,
        against="its budget",
        depth=name_of(depth),
        seeds=len(off),
        value=fmean(off) if off else None,
        low=min(off, default=None),
        high=max(off, default=None),
        bound=bound,
        verdict=_verdict(abs(fmean(off)) <= bound) if off else "not known",
    )


def _verdict(holds: bool) -> Verdict:
    return "holds" if holds else "does not hold"


def verdicts(lines: Sequence[ClaimLine]) -> dict[str, str]:
    """Each claim in words: it holds if it holds everywhere, and not if it fails anywhere."""
    said = {}
    for name in dict.fromkeys(line.claim for line in lines):
        mine = [line for line in lines if line.claim == name]
        counts = {v: sum(line.verdict == v for line in mine) for v in ("holds", "does not hold")}
        if counts["does not hold"]:
            failed = ", ".join(_where(x) for x in mine if x.verdict == "does not hold")
            said[name] = f"does not hold ({counts['holds']} of {len(mine)}; not: {failed})"
        elif counts["holds"] < len(mine):
            said[name] = f"not known yet ({counts['holds']} of {len(mine)} hold, the rest is open)"
        else:
            said[name] = f"holds ({len(mine)} of {len(mine)})"
    return said


def _where(line: ClaimLine) -> str:
    return f"{line.row} at {line.depth}" + (f" against {line.against}" if line.against else "")
