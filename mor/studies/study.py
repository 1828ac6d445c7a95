"""A study file (TOML) and the runs it asks for.

    title = "Gate form"
    size = "sizes/small.toml"       # merged below this file; --size puts another one in its place
    seeds = [0, 1, 2]
    reference = "paper"             # the others are compared with this one, seed by seed
    depth_pays = { deep = "recursive", shallow = "one pass" }   # shown before anything else

    [base]                          # settings of TrainConfig, as in a run's TOML
    steps = 2000
    # of ModelConfig, or arguments of mor.model.config.preset
    model = { preset = "tiny", num_layers = 6 }

    [shapes.mor]                    # what several variants share; usually in the size file
    model = { num_recursions = 4, router.kind = "expert_choice" }

    [variants.paper]                # a shape, if any, and what the variant changes
    like = "mor"
    model.router.gate = "paper"
    at.large = { model.num_layers = 4 }     # and what it changes at one value of an axis

    [axes]                          # every variant with every value
    "model.router.alpha" = [0.1, 1.0]
    width = { small = { model.dim = 48 }, large = { model.dim = 96 } }

    [tuning]                        # the learning rate of every row, chosen on short runs
    rates = [2e-3, 4e-3, 8e-3]

What is measured of a finished run, beside its loss (mor/studies/depths.py):

    windows = 512                   # validation sequences
    depths = [1, 2, 3, 4, 6]        # and the loss at these mean depths, on every other of them;
                                    # to the rest the thresholds of routers that learn are fitted

    [choosers]                      # rows that are these models with another rule choosing
    paper = ["random", "confidence"]

    [[claims]]                      # what the report is to judge
    name = "better than chance"
    row = "paper"
    against = ["paper, by random"]
    depths = [2, 3, "best"]
    below = 0.0

A *row* is a variant with one value of every axis (and one budget); its runs differ in their seeds.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mor.data.corpus import vocab_size
from mor.evaluation.choosers import Chooser, check_can_choose
from mor.files import naming, read_toml
from mor.model.config import ModelConfig, RouterConfig, preset
from mor.run_folder import RunFolder
from mor.settings import (
    Listed,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
    Settings,
    Share,
    Some,
    suggestion,
)
from mor.training.config import TrainConfig, total_steps
from mor.training.resume import cooled

# What a study adds to a run folder: the numbers of a finished run, why it failed, its place.
RESULT, ERROR, ABOUT = "result.json", "error.txt", "study.json"
LABEL = "label_"  # begins the names of axes in tables


class Tuning(Settings, prefix="tuning"):
    """Each row's learning rate: the one whose short run has the lowest causal validation NLL."""

    rates: Listed[tuple[PositiveFloat, ...]] = ()
    share: Share = 0.3
    """Length of the short runs, as a share of the row's budget."""
    seed: Seed = 1000
    """None of the study's seeds, so that the choice favours none of the runs that count."""


class DepthPays(Settings, prefix="depth_pays"):
    """The control: the same unique layers applied once (shallow) against full depth (deep)."""

    deep: str = ""
    shallow: str = ""
    margin: NonNegativeFloat = 0.05
    """By how many nats the shallow one must be worse, interval included."""


class Claim(Settings, prefix="claims"):
    """A sentence about depths that was fixed beforehand, and that the report judges by the seeds.
    Claims of one name are one: it holds if all of them hold at all their depths."""

    name: str
    row: str
    """A row of the table, such as "elastic", or "elastic, by random"."""
    depths: Listed[Some[PositiveFloat | Literal["full", "best"]]]
    """Mean depths; full: all tokens take the trained recursions; best: each row at its own best."""
    against: Listed[tuple[str, ...]] = ()
    """The best of these rows at each depth, by its mean. None: the row itself at the depth before,
    so that the first depth has nothing to be compared with."""
    below: Annotated[float, Field(gt=-math.inf, lt=math.inf)] | None = None
    """Nats that the upper end of the interval of the paired difference must lie below."""
    spent_within: PositiveFloat | None = None
    """Or: how far the mean depth that is spent may lie from the depth, as a share of it, in the
    mean of the seeds."""

    def __post_init__(self) -> None:
        if (self.below is None) == (self.spent_within is None):
            raise ValueError(f"claim {self.name!r} needs below or spent_within, one of the two")
        numbers = all(isinstance(depth, float) for depth in self.depths)
        if self.spent_within is not None and (self.against or not numbers):
            raise ValueError(
                f"claim {self.name!r}: spent_within is about one row at depths that are numbers"
            )
        if self.below is not None and not self.against and not (numbers and len(self.depths) > 1):
            raise ValueError(
                f"claim {self.name!r} names no row to compare with, so it is about the steps "
                "between depths: give two numbers or more"
            )


class Study(Settings):
    title: str
    question: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    axes: dict[str, list[Any] | dict[str, dict[str, Any]]] = field(default_factory=dict)
    seeds: Listed[tuple[Seed, ...]] = (0, 1, 2)
    reference: str = ""
    depth_pays: DepthPays = field(default_factory=DepthPays)
    tuning: Tuning = field(default_factory=Tuning)
    budgets: Listed[tuple[PositiveFloat, ...]] = ()
    """Training FLOPs. One stable run serves all: each budget's cool-down branches off it."""
    exits: Listed[tuple[str, ...]] = ()
    """Variants whose tokens, once trained, also exit early: at random, when sure, by an oracle."""
    windows: PositiveInt = 512
    """Validation sequences that a finished run is measured on."""
    depths: Listed[tuple[PositiveFloat, ...]] = ()
    """Mean depths that a finished run is measured at, on every other of these sequences; the
    thresholds of routers that learn are fitted to the rest."""
    choosers: dict[str, Listed[tuple[Chooser, ...]]] = field(default_factory=dict)
    """Variants that are also measured with other rules choosing who goes deeper, at the same shares
    of tokens; confidence at the same mean depth."""
    claims: Listed[tuple[Claim, ...]] = ()

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError(
                "a study needs at least one [variants.NAME]; an empty table takes the base as it is"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, got {list(self.seeds)}")
        if not self.seeds:
            raise ValueError("a study needs at least one seed; three or more for a claim")
        control = self.depth_pays
        named = (self.reference, control.deep, control.shallow, *self.exits, *self.choosers)
        for name in named:
            if name and name not in self.variants:
                raise ValueError(
                    f"reference, depth_pays, exits and choosers name variants; {name!r} is none of "
                    f"{', '.join(self.variants)}"
                )
        if self.tuning.seed in self.seeds:
            raise ValueError(
                f"tuning.seed={self.tuning.seed} is one of the seeds that count; choose another"
            )
        _check_places(self)
        _check_depths(self)
        if list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets must grow, got {list(self.budgets)}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the study's table: a variant at one value of every axis."""

    variant: str
    labels: Mapping[str, str]
    config: TrainConfig

    @property
    def name(self) -> str:
        return row_name(self.variant, self.labels)


def row_name(variant: str, labels: Mapping[str, str]) -> str:
    return ", ".join([variant, *(f"{axis} {label}" for axis, label in labels.items())])


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run and where it belongs. budget: FLOPs, if the study has several.

    trunk: run directory that this one branches off at ``branch_step``. curve: what is asked of its
    depth curve (:func:`curve_asked`).
    """

    row: str
    variant: str
    labels: Mapping[str, str]
    stage: str
    seed: int
    config: TrainConfig
    budget: float | None = None
    trunk: str | None = None
    branch_step: int = 0
    exits: bool = False
    windows: int = 512
    curve: Mapping[str, Any] | None = None


def load_study(path: Path, *, size: Path | None = None) -> Study:
    """size: used in place of the size file that the study names.

    Raises ValueError for an unknown setting or a name that no variant has.
    """
    values = read_toml(path)
    named = values.pop("size", None)
    if not isinstance(named, str | None):
        raise ValueError(f"size names a file such as 'sizes/small.toml', got {named!r}")
    if size is None and named is not None:
        size = path.parent / named
    merged = merge(read_toml(size) if size else {}, values)
    with naming(path):
        return Study.from_dict(merged)


def study_rows(study: Study) -> list[Row]:
    """Raises ValueError naming the variant whose settings do not fit together."""
    found = []
    for variant, labels, settings in _grid(study):
        changes = study.variants[variant]
        with naming(f"variant {variant!r} {labels or ''}"):
            merged = merge(
                study.base, _shape(study, changes), *settings, *_there(study, changes, labels)
            )
            config = train_config(merged)
            if study.choosers.get(variant):
                check_can_choose(config.model)
            found.append(Row(variant=variant, labels=labels, config=config))
    return found


def _grid(study: Study) -> Iterator[tuple[str, dict[str, str], list[dict[str, Any]]]]:
    """Every variant with every value of every axis: labels by axis, and what each value sets."""
    for variant in study.variants:
        for choice in itertools.product(
            *(_values(name, values) for name, values in study.axes.items())
        ):
            yield (
                variant,
                {_label(axis): label for axis, label, _ in choice},
                [s for _, _, s in choice],
            )


def _label(axis: str) -> str:
    return axis.rpartition(".")[2]


def _check_depths(study: Study) -> None:
    """Claims are about rows and depths that are measured."""
    if list(study.depths) != sorted(set(study.depths)) or min(study.depths, default=1) < 1:
        raise ValueError(f"depths must grow, from 1 on, got {list(study.depths)}")
    if (study.choosers or study.claims) and not study.depths:
        raise ValueError("choosers and claims are about depths: name the depths to measure")
    if study.depths and study.windows < 2:
        raise ValueError("depths need windows of at least 2: some to fit to, some to measure on")
    if study.claims and study.budgets:
        raise ValueError("claims are about rows without budgets")
    rows = [row_name(variant, labels) for variant, labels, _ in _grid(study)]
    rows += [
        chosen_by(row_name(variant, labels), chooser)
        for variant, labels, _ in _grid(study)
        for chooser in study.choosers.get(variant, ())
    ]
    for claim in study.claims:
        for name in (claim.row, *claim.against):
            if name not in rows:
                raise ValueError(
                    f"claim {claim.name!r} is about a row {name!r}{suggestion(name, rows)}; this "
                    f"study has {', '.join(rows)}"
                )
        for depth in claim.depths:
            if isinstance(depth, float) and depth not in study.depths:
                raise ValueError(
                    f"claim {claim.name!r} is about a depth of {depth:g}, which depths does not "
                    "name"
                )


def chosen_by(row: str, chooser: str) -> str:
    """The name of a row that is the models of another one with this rule choosing."""
    return f"{row}, by {chooser}"


def _check_places(study: Study) -> None:
    """Every row needs a folder of its own, and every axis a column of the table; the names of
    columns do not distinguish upper and lower case."""
    columns = {_label(axis).lower(): axis for axis in study.axes}
    if twins := [axis for axis in study.axes if columns[_label(axis).lower()] != axis]:
        raise ValueError(
            f"axes {twins[0]!r} and {columns[_label(twins[0]).lower()]!r} have the same label; "
            "rename one"
        )
    taken: dict[str, str] = {}
    for name in (row_name(variant, labels) for variant, labels, _ in _grid(study)):
        folder = folder_name(name)
        if not folder or folder.startswith("."):
            raise ValueError(
                f"the row {name!r} gets no folder of that name; begin with one of A-Z, a-z, 0-9, + "
                "and -"
            )
        if folder in taken:
            raise ValueError(
                f"the rows {taken[folder]!r} and {name!r} would share the folder {folder!r}; "
                "rename one"
            )
        taken[folder] = name


def _shape(study: Study, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's settings merged over those of its shape."""
    own = {key: value for key, value in changes.items() if key not in ("like", "at")}
    like = changes.get("like")
    if like is None:
        return own
    if not isinstance(like, str) or like not in study.shapes:
        raise ValueError(
            f"there is no shape {like!r}; this study has {', '.join(study.shapes) or 'none'}"
        )
    return merge(study.shapes[like], own)


def _there(
    study: Study, changes: Mapping[str, Any], labels: Mapping[str, str]
) -> list[dict[str, Any]]:
    """What a variant changes only at these values of the axes."""
    at = changes.get("at", {})
    if not isinstance(at, dict) or not all(isinstance(there, dict) for there in at.values()):
        raise ValueError(f"'at' is a table of what changes at each value of an axis, got {at!r}")
    if unknown := set(at) - {
        label for _, all_labels, _ in _grid(study) for label in all_labels.values()
    }:
        raise ValueError(f"no axis has the value {min(unknown)!r} that it names in 'at'")
    return [at[label] for label in labels.values() if label in at]


def _values(axis: str, values: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if isinstance(values, Mapping):
        yield from ((axis, label, settings) for label, settings in values.items())
        return
    for value in values:
        settings: Any = value
        for key in reversed(axis.split(".")):
            settings = {key: settings}
        yield axis, f"{value:g}" if isinstance(value, float) else str(value), settings


def merge(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables merged into one; later ones win."""
    merged: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            before = merged.get(key)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                value = merge(before, value)
            merged[key] = value
    return merged


def train_config(settings: Mapping[str, Any]) -> TrainConfig:
    """A run's settings. The model's may be arguments of :func:`mor.model.config.preset`."""
    values = dict(settings)
    if dotted := [key for key in values if "." in key]:
        raise ValueError(f"write {dotted[0]} without quotes: in quotes it is one name, not a path")
    if isinstance(values.get("model"), Mapping):
        values["model"] = _model(values["model"])
    config = TrainConfig.from_dict(values)
    # What a budget buys depends on the vocabulary, which the data brings along.
    model = config.model.replace(vocab_size=vocab_size(config.data))
    if "vocab_size" in (settings.get("model") or {}) and model != config.model:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} has no effect beside the tokenizer, which "
            f"has {model.vocab_size:,} tokens; leave it out"
        )
    return replace(config, model=model)


def _model(table: Mapping[str, Any]) -> ModelConfig:
    if "preset" not in table:
        return ModelConfig.from_dict(table)
    rest = {key: value for key, value in table.items() if key not in ("preset", "router")}
    return preset(table["preset"], router=RouterConfig.from_dict(table.get("router", {})), **rest)


def tuning_runs(study: Study, out: Path) -> list[Run]:
    """Short runs of every row at every learning rate; none if the study does not tune rates."""
    runs = []
    for row in study_rows(study):
        for rate in study.tuning.rates:
            config = with_budget(row.config, study.budgets[0] if study.budgets else None)
            config = replace(config, optim=replace(config.optim, lr=rate), seed=study.tuning.seed)
            config = replace(
                config, steps=max(1, round(total_steps(config) * study.tuning.share)), flops=None
            )
            runs.append(
                _run(
                    study,
                    row,
                    "tuning",
                    config,
                    out / "tuning" / folder_name(row.name) / f"lr-{rate:g}",
                )
            )
    return runs


def with_budget(config: TrainConfig, flops: float | None) -> TrainConfig:
    return config if flops is None else replace(config, flops=flops)


def with_seed(config: TrainConfig, seed: int) -> TrainConfig:
    """A seed of its own for weights, data order and, where depths are drawn, for the draw."""
    router = config.model.router
    if router.kind == "random":
        config = replace(
            config, model=config.model.replace(router=replace(router, seed=router.seed + seed))
        )
    return replace(config, seed=seed)


def main_runs(study: Study, out: Path, rates: Mapping[str, float]) -> list[list[Run]]:
    """The runs that count, in stages that need the ones before. rates: tuned rates by row."""
    first, branches = [], []
    for row in study_rows(study):
        config = row.config
        if row.name in rates:
            config = replace(config, optim=replace(config.optim, lr=rates[row.name]))
        for seed in study.seeds:
            seeded = with_seed(config, seed)
            place = out / "runs" / folder_name(row.name)
            if not study.budgets:
                first.append(_run(study, row, "main", seeded, place / f"seed-{seed}"))
                continue
            trunk, *rest = _budget_runs(study, row, seeded, place)
            first.append(trunk)
            branches += rest
    stages = [first, branches] if branches else [first]
    # All rows with one seed, then the next seed.
    return [sorted(stage, key=lambda run: study.seeds.index(run.seed)) for stage in stages]


BRANCH_POINTS = 4  # steps of the stable run to branch off, up to the first budget's cool-down


def _budget_runs(study: Study, row: Row, config: TrainConfig, place: Path) -> Iterator[Run]:
    """The run of the largest budget, then its branches; each is within a step of its budget."""
    steps = [total_steps(with_budget(config, budget)) for budget in study.budgets]
    stable = 1 - config.optim.cooldown
    every = max(1, round(steps[0] * stable / BRANCH_POINTS))
    # The warm-up is that of the smallest budget; it must not be longer for the run they share.
    optim = replace(config.optim, warmup=config.optim.warmup * steps[0] / steps[-1])
    points = [round(total * stable / every) * every for total in steps[:-1]]
    trunk = replace(
        config, optim=optim, steps=steps[-1], flops=None, save_every=every, keep_steps=tuple(points)
    )
    names = [place / f"flops-{budget:g}" / f"seed-{config.seed}" for budget in study.budgets]
    yield replace(_run(study, row, "main", trunk, names[-1]), budget=study.budgets[-1])
    for budget, total, at, name in zip(study.budgets, steps, points, names, strict=False):
        last = steps[-1] - round(steps[-1] * config.optim.cooldown)
        if not 0 < at <= min(last, total - 1):
            raise ValueError(
                f"{row.name}: a budget of {budget:g} FLOPs is {total} steps, too near the largest "
                f"one ({steps[-1]} steps) to branch off its stable phase; leave it out or lower "
                "optim.cooldown"
            )
        start = RunFolder(names[-1]).checkpoint(at)
        made = _run(study, row, "branch", cooled(trunk, start, total, total - at), name)
        yield replace(made, budget=budget, trunk=str(names[-1]), branch_step=at)


def _run(study: Study, row: Row, stage: str, config: TrainConfig, out: Path) -> Run:
    return Run(
        row=row.name,
        variant=row.variant,
        labels=row.labels,
        stage=stage,
        seed=config.seed,
        config=replace(config, out=str(out)),
        exits=stage != "tuning" and row.variant in study.exits,
        windows=study.windows,
        curve=curve_asked(study, row.variant) if stage != "tuning" else None,
    )


def curve_asked(study: Study, variant: str) -> dict[str, Any] | None:
    """What is to be measured of a variant's runs at other depths, as plain values; None: nothing.
    A run is measured again when it changes."""
    if not study.depths:
        return None
    choosers = list(study.choosers.get(variant, ()))
    return {"depths": list(study.depths), "windows": study.windows, "choosers": choosers}


def folder_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", name).strip("-")


def variants_named(study: Study, names: Sequence[str]) -> Study:
    """Some of a study's variants, to run only. Raises ValueError for an unknown name."""
    for name in names:
        if name not in study.variants:
            raise ValueError(f"no variant {name!r}; this study has {', '.join(study.variants)}")
    kept = {name: study.variants[name] for name in study.variants if name in names}
    exits = tuple(name for name in study.exits if name in kept)
    choosers = {name: study.choosers[name] for name in study.choosers if name in kept}
    return replace(
        study,
        variants=kept,
        exits=exits,
        choosers=choosers,
        claims=(),
        reference="",
        depth_pays=DepthPays(),
    )
