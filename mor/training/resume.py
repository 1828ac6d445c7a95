"""Going on from a checkpoint: the same run, a longer one, or a branch; never another run unnoticed.

A checkpoint's progress.json holds what its run was: settings, processes, fingerprint of the data.
This module loads without torch, as config.py does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mor.files import naming
from mor.model.config import ModelConfig
from mor.run_folder import RunFolder
from mor.settings import PositiveFloat, PositiveInt, checked, flat
from mor.training.config import OptimConfig, TrainConfig, load_config, total_steps

# What changes nothing of what a run learns.
FREE = (
    "out",
    "branch_from",
    "eval_every",
    "eval_windows",
    "save_minutes",
    "save_every",
    "keep",
    "keep_steps",
    "max_skipped",
    "log_every",
    "profile",
    "tracker",
)
# How it is computed, which moves numbers by rounding.
MACHINE = ("device", "precision", "parallel", "recompute", "compile")
LENGTH = ("steps", "flops")
SCHEDULE = ("optim.warmup", "optim.cooldown")
# A step's sequences may be shared out otherwise, over another number of processes.
SHARED_OUT = ("batch_size", "accumulate")
RESUMABLE = (*LENGTH, *SHARED_OUT, *MACHINE, *(name for name in FREE if name != "branch_from"))
"""Settings that may be given anew when a run is resumed."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint says of its run. schedules: (warmup, cooldown) of every length it had.
    settings, ranks and data are None where mor 0.1.0 wrote it."""

    folder: Path
    step: int
    total_steps: int
    ranks: int | None
    settings: TrainConfig | None
    data: Mapping[str, str | int] | None
    schedules: list[list[float]]

    @classmethod
    def of(cls, folder: Path) -> Saved:
        from mor import checkpoint

        found = checkpoint.load_progress(folder)
        settings = found.get("settings")
        if lacking := {"step", "total_steps"} - found.keys():
            raise ValueError(
                f"{folder} is no checkpoint of a training run: its progress.json has no "
                f"{', '.join(sorted(lacking))}"
            )
        with naming(folder):
            return cls(
                folder=folder,
                step=found["step"],
                total_steps=found["total_steps"],
                ranks=found.get("ranks"),
                settings=TrainConfig.from_dict(settings) if settings else None,
                data=found.get("data"),
                schedules=found.get("schedules", []),
            )


def record(
    config: TrainConfig,
    data: Mapping[str, str | int],
    num_ranks: int,
    schedules: list[list[float]],
) -> dict[str, Any]:
    """What :class:`Saved` reads, for progress.json. data: the corpus's fingerprint. schedules:
    earlier ones of this run."""
    schedule = _schedule(config.optim)
    return {
        "total_steps": total_steps(config, num_ranks),
        "ranks": num_ranks,
        "settings": asdict(config),
        "data": data,
        "schedules": [*(each for each in schedules if each != schedule), schedule],
    }


def _schedule(optim: OptimConfig) -> list[float]:
    return [optim.warmup, optim.cooldown]


class Continued(NamedTuple):
    """notes: what is other than it was, and why it may be."""

    config: TrainConfig
    notes: list[str]


def continued(
    config: TrainConfig,
    saved: Saved,
    model: ModelConfig,
    data: Mapping[str, str | int],
    num_ranks: int,
) -> Continued:
    """Settings with which a run goes on from a checkpoint of it, its schedule fitted to its length.

    model: of the checkpoint. data: fingerprint of the corpus that is there now. Raises ValueError
    that names each difference which would make it another run, and for a run that is too short.
    """
    before = saved.settings or replace(config, model=model)
    known = _schedule(config.optim) in [_schedule(before.optim), *saved.schedules]
    _refuse_another_run(config, before, saved, data, num_ranks, SCHEDULE if known else ())
    total = total_steps(config, num_ranks)
    if total < saved.step:
        raise ValueError(
            f"{saved.folder} has taken {saved.step} steps already, more than the {total} of the "
            "whole run; raise steps"
        )
    optim = lengthened(before.optim, saved.step, saved.total_steps, total)
    config = replace(
        config, optim=replace(config.optim, warmup=optim.warmup, cooldown=optim.cooldown)
    )
    notes = list(_notes(config, before, saved, num_ranks))
    if total != saved.total_steps:
        notes.append(_of_length(before.optim, optim, saved, total))
    return Continued(config, notes)


def branched(
    config: TrainConfig,
    saved: Saved,
    model: ModelConfig,
    data: Mapping[str, str | int],
    num_ranks: int,
) -> Continued:
    """The same for a run that branches off: its schedule and peak rate are its own."""
    before, total = saved.settings or replace(config, model=model), total_steps(config, num_ranks)
    if total <= saved.step:
        raise ValueError(
            f"{saved.folder} has taken {saved.step} steps already; a branch of {total} steps in "
            "all has nothing left to do: raise steps"
        )
    _refuse_another_run(config, before, saved, data, num_ranks, (*SCHEDULE, "optim.lr"))
    return Continued(config, list(_notes(config, before, saved, num_ranks)))


def _refuse_another_run(
    config: TrainConfig,
    before: TrainConfig,
    saved: Saved,
    data: Mapping[str, str | int],
    num_ranks: int,
    but: Sequence[str],
) -> None:
    """Raise ValueError that names each difference. but: dotted settings that may differ as well."""
    from mor.data.stream import what_changed

    found = list(_changed(before, config, [*FREE, *MACHINE, *LENGTH, *SHARED_OUT, *but]))
    if saved.ranks is not None:
        was, now = _shares(before, saved.ranks), _shares(config, num_ranks)
        if math.prod(was) != math.prod(now):
            found.append(
                f"sequences of a step were {_product(was)}, are {_product(now)} (batch_size × "
                "accumulate × processes; choose batch_size so that the product stays)"
            )
    if saved.data is not None and (changed := what_changed(saved.data, data)):
        found.append(f"data: {changed}")
    if found:
        raise ValueError(
            f"this is not the run that {saved.folder} was saved from: {'; '.join(found)}. Restore "
            "what was there, or start a new run with another --out"
        )


def _changed(before: TrainConfig, now: TrainConfig, but: Sequence[str]) -> Iterator[str]:
    """Settings that differ. Data are known by their fingerprint, wherever they lie."""
    was, found = dict(flat(asdict(before))), dict(flat(asdict(now)))
    for name, value in found.items():
        if value != was[name] and name not in (*but, "data.path", "data.validation_path"):
            yield f"{name} was {was[name]}, is {value}"


def _shares(config: TrainConfig, num_ranks: int) -> tuple[int, int, int]:
    return config.batch_size, config.accumulate, num_ranks


def _product(shares: tuple[int, ...]) -> str:
    return f"{' × '.join(map(str, shares))} = {math.prod(shares)}"


def _notes(config: TrainConfig, before: TrainConfig, saved: Saved, num_ranks: int) -> Iterator[str]:
    if saved.settings is None:
        yield (
            f"{saved.folder} was written by mor 0.1.0, which kept neither settings nor a "
            "fingerprint of the data with it: whether they are still the same cannot be checked"
        )
        return
    moved = [
        f"{name} was {was}, is {now}"
        for name in MACHINE
        if (was := getattr(before, name)) != (now := getattr(config, name))
    ]
    if saved.ranks != num_ranks:
        moved.append(f"processes were {saved.ranks}, are {num_ranks}")
    if moved:
        yield f"{'; '.join(moved)}: numbers may differ from those of the same run by rounding"


def _of_length(before: OptimConfig, optim: OptimConfig, saved: Saved, total: int) -> str:
    text = f"the run ends at step {total}, not {saved.total_steps} as it was planned"
    if saved.step <= (last := last_stable(before, saved.total_steps)):
        return text
    return (
        f"{text}. Its learning rate has fallen since step {last}: it returns to its peak and falls "
        f"again in the last {round(optim.cooldown * total)} steps. For what a run planned for "
        f"{total} steps would be, start from a checkpoint up to step {last}: --branch-from "
        f"CHECKPOINT --steps {total}"
    )


def last_stable(optim: OptimConfig, total: int) -> int:
    """The last step up to which a trapezoid has not begun to fall."""
    return math.floor(total * (1 - optim.cooldown))


def lengthened(optim: OptimConfig, step: int, before: int, total: int) -> OptimConfig:
    """The schedule of a run that was planned for ``before`` steps, has taken ``step``, and is to
    take ``total``: the warm-up keeps its steps, the cool-down its share of the run, as far as that
    is not over. So up to the cool-down it is the schedule of a run planned for ``total`` steps with
    these settings.

    Raises ValueError for a cosine, which depends on the length from its first step down, and for
    a ``total`` within the warm-up.
    """
    if total == before:
        return optim
    warm = optim.warmup * before
    if optim.schedule == "cosine" and step > warm:
        raise ValueError(
            f"a run with a cosine schedule cannot be given another length: its learning rate has "
            f"fallen towards the {before} steps that it was planned for. Start a new run of "
            f"{total} steps; with optim.schedule='trapezoid' it can be lengthened later"
        )
    if total < warm:
        raise ValueError(f"the warm-up alone takes {warm:g} steps, more than the {total} in all")
    left = (total - max(step, warm)) / total
    return replace(optim, warmup=warm / total, cooldown=min(optim.cooldown, left))


@checked
def branch(
    start: str | Path,
    *,
    cooldown_steps: PositiveInt | None = None,
    steps: PositiveInt | None = None,
    lr: PositiveFloat | None = None,
    out: str,
) -> TrainConfig:
    """Settings of a run that starts from a checkpoint of another run, with that run's settings.

    cooldown_steps: the learning rate decays from there to its end, so that one long run serves
    several budgets (the paper's way). steps: it goes on to that many steps in all, as a run planned
    for them would. lr: another peak rate. Raises ValueError if the checkpoint lies in the decay of
    its own run, or for ``cooldown_steps`` in its warm-up.
    """
    from mor import checkpoint

    if (cooldown_steps is None) == (steps is None):
        raise ValueError("a branch takes either cooldown_steps or steps")
    folder = checkpoint.resolve(start)
    saved, run = Saved.of(folder), RunFolder.of(folder)
    if saved.settings is None and not run.settings.is_file():
        raise ValueError(f"{folder} does not belong to a run (there is no {run.settings})")
    config = saved.settings or load_config(run.settings)
    if lr is not None:
        config = replace(config, optim=replace(config.optim, lr=lr))
    first = math.ceil(saved.total_steps * config.optim.warmup) if cooldown_steps else 0
    last = last_stable(config.optim, saved.total_steps)
    if config.optim.schedule != "trapezoid" or not first <= saved.step <= last:
        raise ValueError(
            f"{folder} is at step {saved.step}; a branch needs a checkpoint of the stable phase of "
            f"a trapezoid schedule, here steps {first} to {last} (keep them with --save-every and "
            "--keep 0)"
        )
    if cooldown_steps is not None:
        made = cooled(config, folder, saved.step + cooldown_steps, cooldown_steps)
    else:
        assert steps is not None
        optim = lengthened(config.optim, saved.step, saved.total_steps, steps)
        made = replace(config, steps=steps, flops=None, optim=optim, branch_from=str(folder))
    return replace(made, out=out)


def cooled(config: TrainConfig, start: Path, steps: int, cooldown_steps: int) -> TrainConfig:
    """A run's settings, from a checkpoint of it to an end at ``steps``; see :func:`branch`."""
    optim = replace(config.optim, warmup=0.0, cooldown=cooldown_steps / steps)
    return replace(config, steps=steps, flops=None, optim=optim, branch_from=str(start))
