"""Where the runs of a study go."""

from __future__ import annotations

from typing import Literal

from mor.settings import NonNegativeInt, PositiveFloat, PositiveInt, Settings


class Workers(Settings):
    """``jobs`` at a time, each with ``threads`` threads, or one on each GPU, or a cluster."""

    jobs: PositiveInt = 1
    """Runs at a time."""
    threads: PositiveInt = 1
    """CPU threads of each run."""
    gpus: NonNegativeInt = 0
    """One run at a time on each of this many GPUs, in place of jobs."""
    cluster: Literal["slurm", "local", "debug"] | None = None
    """slurm: each stage of runs is a job array, by submitit; local and debug are its dry runs."""
    partition: str | None = None
    """Slurm partition."""
    hours: PositiveFloat = 24.0
    """Time limit of a cluster job."""
