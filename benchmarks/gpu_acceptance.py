"""One command that shows whether everything works on a GPU, and how fast: offline, under nine
minutes on one H100.

    python benchmarks/gpu_acceptance.py --out results.jsonl
    python benchmarks/gpu_acceptance.py --stage decoding          # one stage
    python benchmarks/gpu_acceptance.py --device cpu --tiny       # the script itself, anywhere

Every stage is a process of its own with a time limit, so none can take the others down. A result is
printed as a line of JSON as soon as it is known; a table follows at the end. The exit code is 0 if
every promise holds, 1 if one is broken or a stage died. See acceptance_stages.py for the stages.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from acceptance_stages import STAGES, Result, run
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Settings:
    stage: tuple[str, ...] = ()
    """Only these, in the order of the list."""
    device: str = "cuda"
    tiny: bool = False
    """Small sizes: whether everything runs, no promises of speed."""
    out: Path | None = None
    """Add the lines of JSON there."""
    inside: bool = False
    """Run the stage in this process; what the command does with itself."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if unknown := [name for name in settings.stage if name not in STAGES]:
        raise SystemExit(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if settings.inside:
        return run_inside(settings)
    results: list[Result] = []
    for name in STAGES:
        if not settings.stage or name in settings.stage:
            for result in run_outside(name, settings):
                results.append(result)
                line = json.dumps(asdict(result))
                print(line, flush=True)
                if settings.out is not None:
                    with settings.out.open("a") as file:
                        file.write(line + "\n")
    show(results)
    sys.exit(any(result.holds is False for result in results))


def run_inside(settings: Settings) -> None:
    """Each result is a line on standard output that begins with ``=``."""
    (name,) = settings.stage
    run(name, settings.device, tiny=settings.tiny)


def run_outside(name: str, settings: Settings) -> Iterator[Result]:
    """The results of a stage in a process of its own; a failed one more if it dies or takes too
    long."""
    command = [sys.executable, __file__, "--inside", "--stage", name, "--device", settings.device]
    started = time.monotonic()
    limit_s = STAGES[name].limit_s * (5 if settings.device == "cpu" else 1)
    with subprocess.Popen(
        [*command, *(["--tiny"] if settings.tiny else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines, said = lines_of(process), []
        while True:
            try:
                line = lines.get(timeout=max(0.0, started + limit_s - time.monotonic()))
            except queue.Empty:
                process.kill()
                yield failed(name, "the stage", f"stopped after {limit_s} s", said)
                break
            if line is None:
                if process.wait():
                    yield failed(name, "the stage", f"exit code {process.returncode}", said)
                break
            if line.startswith("="):
                yield Result(**json.loads(line[1:]))
            else:
                said.append(line)
    yield Result(name, "time", round(time.monotonic() - started, 1), f"s, at most {limit_s}")


def lines_of(process: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """What a process prints, line by line, and None at the end; read by a thread, so that waiting
    for a line can end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def failed(stage: str, name: str, why: str, said: list[str]) -> Result:
    return Result(stage, name, None, "\n".join([why, *said[-15:]]), False)


_HOLDS: dict[bool | None, Literal["yes", "NO", ""]] = {True: "yes", False: "NO", None: ""}


def show(results: list[Result]) -> None:
    table = Table("stage", "result", "value", "promise or unit", "holds", title="Acceptance")
    for r in results:
        value = f"{r.value:.4g}" if isinstance(r.value, float) else str(r.value or "")
        table.add_row(r.stage, r.name, value, r.detail, _HOLDS[r.holds])
    console = Console()
    Console(width=max(110, console.width)).print(table)
    promises = [r for r in results if r.holds is not None]
    kept = sum(bool(r.holds) for r in promises)
    print(f"{kept} of {len(promises)} promises hold")


if __name__ == "__main__":
    main()
