"""A training run on disk: what lies where, who may write to it, and which checkpoints it has."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor.files import alone_in, link, naming, parse_json, remove_folder, replacing, tidy

_SETTINGS = "train.json"
_CHECKPOINTS = "checkpoints"
_STEP = "step-"
_NEWEST = "latest"


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run. Nothing needs to exist yet.

    train.json                   its settings
    metrics.jsonl                a JSON object for each step that was logged or validated
    checkpoints/step-00000500/   see checkpoint.py
    trace.json.gz                what some steps did when, if it was asked for
    latest                       a link to the newest checkpoint
    config.json and the like     links to its files: the run is a model folder for transformers
    .lock                        held by the process that trains
    """

    path: Path

    @classmethod
    def of(cls, checkpoint: Path) -> RunFolder:
        """The run that a checkpoint belongs to; without settings if it lies outside a run."""
        return cls(checkpoint.parent.parent)

    @classmethod
    def below(cls, folder: Path) -> list[RunFolder]:
        """The runs in a folder and its subfolders, by name."""
        found = {file.parent for file in folder.rglob(_SETTINGS)}
        found |= {path.parent.parent for path in folder.rglob(f"{_CHECKPOINTS}/{_STEP}[0-9]*[0-9]")}
        return [cls(path) for path in sorted(found)]

    @property
    def settings(self) -> Path:
        return self.path / _SETTINGS

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json.gz"

    @property
    def is_begun(self) -> bool:
        """Whether it holds something that a run can continue from. What a start that failed left
        behind is free to be written over."""
        return bool(self.checkpoints())

    def lock(self) -> AbstractContextManager[None]:
        """Makes the folder, and holds it for this process; see :func:`mor.files.alone_in`."""
        return alone_in(self.path, doing="training in")

    def tidy(self) -> None:
        """Remove what a killed process left unfinished, or finish it. Needs the lock."""
        tidy(self.path)
        tidy(self._checkpoints)

    # Metrics

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows; none before the run began. A last line that a crash cut off is left out."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text().splitlines(keepends=True)
        with naming(self.metrics):
            return [parse_json(line, "a row") for line in lines if line.endswith("\n")]

    def keep_metrics(self, up_to: int) -> None:
        """Drop the rows after a step, which the run is about to write again."""
        kept = [row for row in self.read_metrics() if row["step"] <= up_to]
        with replacing(self.metrics) as unfinished:
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Raises OSError if the row does not fit on the disk, and then leaves no half of it."""
        line = (json.dumps(row) + "\n").encode()
        with self.metrics.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.metrics))

    # Checkpoints

    @property
    def _checkpoints(self) -> Path:
        return self.path / _CHECKPOINTS

    def checkpoint(self, step: int) -> Path:
        """Path of the checkpoint after ``step`` steps, whether it exists or not."""
        return self._checkpoints / f"{_STEP}{step:08d}"

    def checkpoints(self) -> list[Path]:
        """The checkpoints that exist, oldest first."""
        return sorted(self._checkpoints.glob(f"{_STEP}[0-9]*[0-9]"))

    def newest_intact(self, check: Callable[[Path], None]) -> Path | None:
        """The newest checkpoint, None if there is none yet. check: raises ValueError for a damaged
        one.

        Raises ValueError if that one is damaged, naming the newest one that is not.
        """
        problems: dict[Path, ValueError] = {}
        for path in reversed(self.checkpoints()):
            try:
                check(path)
            except ValueError as error:
                problems[path] = error
                continue
            if not problems:
                return path
            first, damaged = next(iter(problems.values())), " ".join(map(str, problems))
            raise ValueError(
                f"{first}; {path} is intact: to continue from there, delete what is damaged "
                f"(rm -r {damaged})"
            ) from first
        if problems:
            first = next(iter(problems.values()))
            raise ValueError(f"{first}; no checkpoint of {self.path} is intact") from first
        return None

    def prune(self, keep: int, keep_steps: Iterable[int] = ()) -> None:
        """Delete all checkpoints but the newest ``keep`` (0: delete none) and those of
        ``keep_steps``, which do not count towards ``keep``."""
        spared = {self.checkpoint(step) for step in keep_steps}
        others = [path for path in self.checkpoints() if path not in spared]
        for path in others[:-keep] if keep else []:
            remove_folder(path)

    def link_newest(self) -> None:
        """Let the run serve as a model folder, so that ``from_pretrained`` takes it.

        All files change at once, with the one link that they lead through. Raises OSError on
        filesystems without links.
        """
        if not (found := self.checkpoints()):
            return
        link(self.path / _NEWEST, Path(self._checkpoints.name, found[-1].name))
        for file in found[-1].iterdir():
            if file.is_file():  # the checksums too, for whoever looks at them there
                link(self.path / file.name, Path(_NEWEST, file.name))
