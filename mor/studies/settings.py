"""Where the runs of a study go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Workers:
    """jobs at a time, each with ``threads`` threads; or with ``gpus`` one run on each; or a
    cluster."""

    jobs: int = 1
    """Runs at a time."""
    threads: int = 1
    """CPU threads of each run."""
    gpus: int = 0
    """One run at a time on each of this many GPUs, in place of jobs."""
    cluster: Literal["slurm", "local", "debug"] | None = None
    """slurm: each stage of runs is a job array, handed over by submitit; local and debug are its
    dry runs."""
    partition: str | None = None
    """Slurm partition."""
    hours: float = 24.0
    """Time limit of a cluster job."""

    def __post_init__(self) -> None:
        if min(self.jobs, self.threads) < 1 or self.gpus < 0:
            raise ValueError(
                f"jobs and threads must be at least 1, got {self.jobs} and {self.threads}"
            )
