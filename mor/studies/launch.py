"""Runs of a study on the cores, GPUs or cluster at hand.

Every run is an ordinary run folder. A finished one has ``result.json`` and is kept; one that was
interrupted continues where it stopped; one that fails leaves ``error.txt`` and stops no other.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from mor.accessories import plain_warnings
from mor.files import extra, write_json
from mor.interruption import deaf_children, leaving_at_second
from mor.progress import ProgressBar
from mor.run_folder import RunFolder
from mor.studies.depths import measure_missing
from mor.studies.results import collect, flat, measure, tuned_rates
from mor.studies.settings import Workers
from mor.studies.study import ABOUT, ERROR, RESULT, Run, Study, main_runs, study_rows, tuning_runs
from mor.training.config import TrainConfig, load_config, total_flops, total_steps
from mor.training.loop import train
from mor.training.resume import branch

Status = Literal["finished", "kept", "interrupted", "failed"]
DIED = "its process died: killed from outside or out of memory"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    run: Run
    status: Status
    reason: str = ""


def run_study(study: Study, out: Path, workers: Workers, console: Console) -> list[Outcome]:
    """Run everything of a study that is not finished. A stage waits for the one before it: tuning,
    then the runs that count, then those that branch off them. Raises ValueError, before anything is
    run or written, for settings that do not fit and for a folder that holds another run."""
    stages = main_runs(study, out, {})
    tuning = tuning_runs(study, out)
    _refuse_other_runs([tuning] if tuning else stages)  # the rates of the others are known later
    outcomes = launch(tuning, workers, console, folder=out)
    if tuning:
        if untried := dict.fromkeys(
            run.row for run in tuning if not was_tried(Path(run.config.out))
        ):
            raise ValueError(
                f"rates of {', '.join(untried)} are still to be tried; start the study again to "
                "continue"
            )
        rates = tuned_rates(collect(out), study.tuning.rates)
        if failed := [row.name for row in study_rows(study) if row.name not in rates]:
            raise ValueError(
                f"of {', '.join(failed)} every learning rate failed; see tuning/*/*/{ERROR}"
            )
        stages = main_runs(study, out, rates)
        _refuse_other_runs(stages)
    for runs in stages:
        outcomes += launch(runs, workers, console, folder=out)
        if interrupted(outcomes):
            raise ValueError("the study was interrupted; start it again to continue")
    return outcomes


def _refuse_other_runs(stages: Sequence[Sequence[Run]]) -> None:
    for run in (run for stage in stages for run in stage):
        is_done(Path(run.config.out), run.config)


def was_tried(path: Path) -> bool:
    """Whether a run finished or failed by itself. One that was interrupted or killed says nothing
    about its settings."""
    return (path / RESULT).is_file() or (path / ERROR).is_file()


def interrupted(outcomes: Sequence[Outcome]) -> bool:
    return any(outcome.status == "interrupted" for outcome in outcomes)


def run_one(run: Run, threads: int) -> Outcome:
    """Train, measure, write ``result.json``. An error in the run becomes a failed outcome."""
    torch.set_num_threads(threads)
    path = Path(run.config.out)
    try:
        # Locked before anything is written: another sweep may be working on it.
        with RunFolder(path).lock():
            return Outcome(run=run, status=_run_alone(run, path))
    except Exception as error:  # whatever it is, the other runs continue
        return Outcome(run=run, status="failed", reason=_reason(error))


def _run_alone(run: Run, path: Path) -> Status:
    done = is_done(path, run.config)  # if it is another run, its folder stays as it is
    (path / ERROR).unlink(missing_ok=True)
    try:
        write_json(path / ABOUT, {k: v for k, v in asdict(run).items() if k != "config"})
        if not done:
            check_trunk(run)
            result = train(run.config, resume=True, console=Console(quiet=True))
            if not result.finished:
                return "interrupted"
            write_json(path / RESULT, measure(run, result))
    except Exception as error:
        (path / ERROR).write_text(f"{_reason(error)}\n\n{traceback.format_exc()}")
        raise
    if run.curve is not None:
        measure_missing([(path, run.curve)])  # the report tries once more, and says why it failed
    return "kept" if done else "finished"


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_trunk(run: Run) -> None:
    """Raise ValueError if the checkpoint to branch off is missing or has other settings."""
    if run.config.branch_from is None or RunFolder(Path(run.config.out)).settings.is_file():
        return
    if not Path(run.config.branch_from).is_dir():
        raise ValueError(
            f"{run.trunk} has no checkpoint of step {run.branch_step} to branch off; did it finish?"
        )
    cooldown = run.config.steps - run.branch_step
    found = branch(run.config.branch_from, cooldown_steps=cooldown, out=run.config.out)
    _check_settings(found, run.config, f"{run.trunk} holds")


def is_done(path: Path, config: TrainConfig) -> bool:
    """Whether this run is finished. Raises ValueError if its folder holds another one."""
    folder = RunFolder(path)
    if not folder.settings.is_file():
        return False
    finished = (path / RESULT).is_file()
    if finished or folder.is_begun:  # a start that failed holds nothing
        _check_settings(load_config(folder.settings), config, f"{path} holds")
    return finished


# Where a run lies (the study's folder may have moved), and what changes nothing that is measured.
FREE = ("out", "branch_from", "save_minutes", "save_every", "keep", "keep_steps")


def _check_settings(saved: TrainConfig, wanted: TrainConfig, holds: str) -> None:
    same = {name: getattr(saved, name) for name in FREE}
    saved, wanted = (replace(each, data=each.data.filled()) for each in (saved, wanted))
    wanted = replace(wanted, model=wanted.model.replace(vocab_size=saved.model.vocab_size), **same)
    if wanted != saved:
        raise ValueError(
            f"{holds} a run with other settings ({_difference(saved, wanted)}); delete it or use "
            "--out"
        )


def _difference(saved: TrainConfig, wanted: TrainConfig) -> str:
    a, b = flat(asdict(saved)), flat(asdict(wanted))
    return ", ".join(f"{k} {a[k]}, now {b[k]}" for k in a if a[k] != b.get(k))


def launch(
    runs: Sequence[Run], workers: Workers, console: Console, *, folder: Path
) -> list[Outcome]:
    """Run all of these, none of which needs another. folder: for the cluster's logs."""
    if not runs:
        return []
    if not workers.cluster:
        _check_gpus(runs, workers.gpus)
    done: list[Outcome] = []
    watch = _Watch(runs, console)
    outcomes = (
        _on_cluster(runs, workers, folder, watch.update)
        if workers.cluster
        else _in_processes(runs, workers, watch.update)
    )
    with watch.bar, leaving_at_second(watch.say_interrupted):
        for outcome in outcomes:
            done.append(outcome)
            watch.note(outcome)
    return done


def _check_gpus(runs: Sequence[Run], wanted: int) -> None:
    if wanted > torch.cuda.device_count():
        raise ValueError(
            f"gpus={wanted}, but PyTorch sees {torch.cuda.device_count()} here; use --jobs on CPUs"
        )
    if wanted and any(run.config.device == "cpu" for run in runs):
        raise ValueError(
            "the study sets device='cpu', so GPUs would stand idle; leave device out, or use --jobs"
        )


def _in_processes(
    runs: Sequence[Run], workers: Workers, idle: Callable[[], None]
) -> Iterator[Outcome]:
    """idle: called about every second while runs are going. A run whose process dies is tried once
    more, alone: it may have been killed because the others took the memory."""
    os.environ["OMP_NUM_THREADS"] = str(workers.threads)
    places = visible_gpus(workers.gpus) if workers.gpus else [""] * workers.jobs
    died = []
    for outcome in _side_by_side(runs, places, workers.threads, idle):
        if outcome.reason == DIED and len(places) > 1:
            died.append(outcome.run)
        else:
            yield outcome
    for run in died:
        yield from _side_by_side([run], places[:1], workers.threads, idle)


def _side_by_side(
    runs: Sequence[Run], places: Sequence[str], threads: int, idle: Callable[[], None]
) -> Iterator[Outcome]:
    """A process for every run, as many at a time as there are places: GPUs, or empty names.

    Not a pool: its workers share a pipe and a lock, so one that is killed can take others with it.
    They ignore Ctrl-C; this process tells them to save their runs.
    """
    context: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    # Once for all processes what every run imports sooner or later: that takes seconds.
    multiprocessing.set_forkserver_preload(
        [__name__, "mor.training.sharded_state", "torch._dynamo"]
    )
    if os.name == "posix":
        with deaf_children():
            forkserver.ensure_running()
    left, free = deque(runs), deque(places)
    going: dict[Connection, tuple[Run, str, BaseProcess]] = {}
    try:
        while left or going:
            while left and free:
                run, place = left.popleft(), free.popleft()
                answer, end = context.Pipe(duplex=False)
                process = context.Process(target=_run_in_process, args=(run, threads, place, end))
                with deaf_children():
                    process.start()
                end.close()  # so that the answer ends with the process
                going[answer] = run, place, process
            ready = wait(going, timeout=1.0)
            for answer in [answer for answer in going if answer in ready]:
                run, place, process = going.pop(answer)
                try:
                    outcome = answer.recv()
                except (EOFError, OSError):
                    outcome = Outcome(run=run, status="failed", reason=DIED)
                process.join()
                free.append(place)
                yield outcome
            idle()
    finally:
        _stop([process for _, _, process in going.values()])


def _stop(processes: Sequence[BaseProcess]) -> None:
    """Have them save their runs; with a second Ctrl-C, end at once."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        raise


def visible_gpus(count: int) -> list[str]:
    """Names of the first ``count`` GPUs that this process may use, one for each worker."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (given.split(",") if given else [str(gpu) for gpu in range(count)])[:count]


def _run_in_process(run: Run, threads: int, gpu: str, answer: Connection) -> None:
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    plain_warnings()
    warnings.filterwarnings("ignore", ".*has no effect.*")  # the study said so when it was planned
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    # The study is gone, or there was a second Ctrl-C: the study says so, not each of its processes.
    with suppress(BrokenPipeError, KeyboardInterrupt):
        answer.send(run_one(run, threads))


def _stop_with_parent() -> None:
    """Save the run and end when the study is gone: nobody else would stop this worker."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _on_cluster(
    runs: Sequence[Run], workers: Workers, folder: Path, idle: Callable[[], None]
) -> Iterator[Outcome]:
    """An interruption cancels unfinished jobs; their runs save themselves and can continue."""
    with extra("cluster", needed_for="a cluster"):
        import submitit
    if workers.cluster == "slurm" and not shutil.which("srun"):
        raise ValueError(
            "this machine has no srun: call mor sweep where jobs are submitted to Slurm, or use "
            "--jobs"
        )
    executor = submitit.AutoExecutor(folder=folder / "cluster", cluster=workers.cluster)
    executor.update_parameters(
        timeout_min=round(workers.hours * 60),
        cpus_per_task=workers.threads,
        gpus_per_node=1 if workers.gpus else 0,
        slurm_array_parallelism=workers.gpus or workers.jobs,
        **({"slurm_partition": workers.partition} if workers.partition else {}),
    )
    jobs = executor.map_array(run_one, runs, [workers.threads] * len(runs))
    waiting = list(zip(jobs, runs, strict=True))
    try:
        while waiting:
            for pair in [pair for pair in waiting if pair[0].done()]:
                waiting.remove(pair)
                yield _outcome(*pair, submitit)
            idle()
            time.sleep(1.0 if waiting else 0.0)
    finally:
        for job, _ in waiting:
            job.cancel(check=False)


def _outcome(job: Any, run: Run, submitit: Any) -> Outcome:
    try:
        outcome: Outcome = job.result()
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
        return Outcome(run=run, status="failed", reason=f"job {job.job_id}: {_reason(error)}")
    return outcome


class _Watch:
    """Progress in FLOPs over all runs, read from their metrics, and a line for each that ends."""

    def __init__(self, runs: Sequence[Run], console: Console) -> None:
        self.flops = [(run, flops_of(run)) for run in runs]
        self.left, self.looked = len(runs), 0.0
        total = sum(flops for _, flops in self.flops)
        self.bar = ProgressBar(console, f"{len(runs)} runs", total=total)

    def update(self) -> None:
        if time.monotonic() - self.looked > 3:
            self.looked = time.monotonic()
            self.bar.update(self._done(), label=f"{self.left} runs")

    def note(self, outcome: Outcome) -> None:
        self.left -= 1
        if outcome.status == "kept":
            return
        run = outcome.run
        text = f"{outcome.status:<11} {run.stage:<6} {run.row}, {_which(run)}"
        text += f": {outcome.reason}" if outcome.reason else ""
        self.bar.note(text)

    def say_interrupted(self) -> None:
        self.bar.note("stopping: each run saves after its step; Ctrl-C again stops now")

    def _done(self) -> float:
        return sum(flops * _share(run) for run, flops in self.flops)


def _which(run: Run) -> str:
    if run.stage == "tuning":
        return f"lr {run.config.optim.lr:g}"
    return f"seed {run.seed}" + (f", {run.budget:g} FLOPs" if run.budget else "")


def flops_of(run: Run) -> float:
    """Training FLOPs of this run alone, without its trunk's."""
    return total_flops(run.config, after=run.branch_step)


def _share(run: Run) -> float:
    """How much of a run is done, from 0 to 1."""
    path = Path(run.config.out)
    if (path / RESULT).is_file():
        return 1.0
    rows = RunFolder(path).read_metrics()
    done = rows[-1]["step"] - run.branch_step if rows else 0
    return min(1.0, done / max(1, total_steps(run.config) - run.branch_step))
