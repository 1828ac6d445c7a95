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
from mor.training.config import (
    OptimConfig,
    TrainConfig,
    load_config,
    settings_in,
    settings_of,
    total_steps,
)

# What changes nothing of what a run learns.
FREE = (
    "out",
    "branch_from",
    "init_from",
    "source_cache",
    "eval_every",
    "eval_windows",
    "save_minutes",
    "save_every",
    "keep",
    "keep_steps",
    "max_skipped",
    "calibrate",
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
ANEW = (*MACHINE, *(name for name in FREE if not name.endswith("_from")))
"""Settings that may be given anew when a run goes on, here or in another folder."""
RESUMABLE = (*LENGTH, *SHARED_OUT, *ANEW)
"""Settings that may be given anew when a run is resumed."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint says of its run. settings: as they were chosen. schedules: (warmup,
    cooldown) of every length it had, the one in force last. settings, ranks and data are None where
    mor 0.1.0 wrote it."""

    folder: Path
    step: int
    total_steps: int
    ranks: int | None
    settings: TrainConfig | None
    data: Mapping[str, str | int] | None
    schedules: list[list[float]]
    skipped_in_a_row: int = 0
    """Steps just before it that were skipped: the run may be spoilt already."""

    @classmethod
    def of(cls, folder: Path) -> Saved:
        from mor import checkpoint

        found = checkpoint.load_progress(folder)
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
                settings=settings_in(folder),
                data=found.get("data"),
                schedules=found.get("schedules", []),
                skipped_in_a_row=found.get("skipped_in_a_row", 0),
            )

    @property
    def in_force(self) -> TrainConfig | None:
        """The settings with the schedule that the run follows at its present length."""
        if self.settings is None or not self.schedules:
            return self.settings
        warmup, cooldown = self.schedules[-1]
        return with_schedule(self.settings, warmup, cooldown)


def with_schedule(config: TrainConfig, warmup: float, cooldown: float) -> TrainConfig:
    return replace(config, optim=replace(config.optim, warmup=warmup, cooldown=cooldown))


def record(
    config: TrainConfig,
    data: Mapping[str, str | int],
    num_ranks: int,
    schedules: list[list[float]],
    optim: OptimConfig,
) -> dict[str, Any]:
    """What :class:`Saved` reads, for progress.json. config: as chosen. data: the corpus's
    fingerprint. schedules: earlier ones of this run. optim: with the schedule in force."""
    schedule = _schedule(optim)
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
    """config: with the schedule in force. notes: what is other than it was, and why it may be."""

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
    was = (saved.in_force or before).optim
    known = _schedule(config.optim) in [_schedule(before.optim), *saved.schedules]
    _refuse_another_run(config, before, saved, data, num_ranks, SCHEDULE if known else ())
    if config.flops is not None and bool(config.source_cache) != bool(before.source_cache):
        raise ValueError(
            f"the {saved.total_steps} steps of {saved.folder} were planned by its FLOPs, of which "
            "source_cache saves some: with or without it they are not as many. Leave it as it was, "
            f"or give the run steps={saved.total_steps}"
        )
    total = total_steps(config, num_ranks)
    if total < saved.step:
        raise ValueError(
            f"{saved.folder} has taken {saved.step} steps already, more than the {total} of the "
            f"whole run; raise {'steps' if config.flops is None else 'flops'}"
        )
    optim = was
    if total != saved.total_steps:
        # The cool-down as it was chosen, not what a short run left of it.
        optim = replace(was, cooldown=before.optim.cooldown)
        optim = lengthened(optim, saved.step, saved.total_steps, total)
    config = with_schedule(config, optim.warmup, optim.cooldown)
    notes = list(_notes(config, before, saved, num_ranks))
    if total != saved.total_steps:
        notes.append(_of_length(was, optim, saved, total))
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
    _check_something_left(saved, total)
    _refuse_another_run(config, before, saved, data, num_ranks, (*SCHEDULE, "optim.lr"))
    return Continued(config, list(_notes(config, before, saved, num_ranks)))


def _check_something_left(saved: Saved, total: int) -> None:
    """Raise ValueError for a branch that ends where it starts, or before."""
    if total <= saved.step:
        raise ValueError(
            f"{saved.folder} has taken {saved.step} steps already; a branch of {total} steps in "
            "all has nothing left to do: raise steps"
        )


def _refuse_another_run(
    config: TrainConfig,
    before: TrainConfig,
    saved: Saved,
    data: Mapping[str, str | int],
    num_ranks: int,
    but: Sequence[str],
) -> None:
    """Raise ValueError that names each difference. but: dotted settings that may differ as well."""
    from mor.data.corpus import what_changed

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
    if bool(before.source_cache) != bool(config.source_cache):
        moved.append(f"source_cache was {before.source_cache}, is {config.source_cache}")
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


def can_branch(folder: Path) -> bool:
    """Whether :func:`branch` with ``steps`` takes this checkpoint."""
    saved = Saved.of(folder)
    return (config := saved.in_force) is not None and _is_stable(config.optim, saved)


def _is_stable(optim: OptimConfig, saved: Saved, first: int = 0) -> bool:
    last = last_stable(optim, saved.total_steps)
    return optim.schedule == "trapezoid" and first <= saved.step <= last


def settings_to_resume(path: str) -> TrainConfig:
    """Of the run at ``path``: those in its folder, or else those that its newest checkpoint keeps.
    Raises ValueError if it has neither."""
    from mor import checkpoint

    run = RunFolder(Path(path))
    if run.settings.is_file():
        return load_config(run.settings)
    if (newest := run.newest_intact(checkpoint.check_to_continue)) is None:
        raise ValueError(f"{path} holds no run to resume (no {run.settings.name}, no checkpoint)")
    if (found := settings_in(newest)) is None:
        raise ValueError(
            f"{path} has no {run.settings.name}, and its checkpoints are of mor 0.1.0, which did "
            "not keep the settings with them; restore a copy of that file"
        )
    return found


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
    if (config := saved.in_force or settings_of(folder)) is None:
        raise ValueError(f"{folder} does not belong to a run (there is no {run.settings})")
    if lr is not None:
        config = replace(config, optim=replace(config.optim, lr=lr))
    if steps is not None:
        _check_something_left(saved, steps)
    first = math.ceil(saved.total_steps * config.optim.warmup) if cooldown_steps else 0
    if not _is_stable(config.optim, saved, first):
        last = last_stable(config.optim, saved.total_steps)
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
