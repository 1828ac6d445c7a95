"""mor info"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from tyro.conf import Positional

from mor.cli.command import Command
from mor.cli.show import print_facts
from mor.data.manifest import is_prepared
from mor.run_folder import RunFolder


class Info(Command):
    """What a run or checkpoint is: its model, its data, the settings that were changed, how far it
    got, and what it scored."""

    path: Positional[Path]
    """A run folder or a checkpoint."""
    json: bool = False

    def run(self, console: Console) -> None:
        from mor.cli.describe import Facts, facts

        if is_prepared(self.path):
            raise ValueError(f"{self.path} is prepared data; mor data info {self.path} shows it")
        here = RunFolder(self.path)
        if (below := RunFolder.below(self.path)) and here not in below:
            raise ValueError(f"{self.path} is a folder of runs; mor runs {self.path} lists them")
        found: Facts = facts(self.path)
        print_facts(describe(found), self.json, console, title=str(self.path))


def describe(found: Any) -> dict[str, Any]:
    """Everything about a run or checkpoint, in groups."""
    from mor.cli.describe import data_facts, model_facts, size_of

    run, done = found.settings, found.progress
    groups: dict[str, dict[str, Any]] = {"model": model_facts(found.model)}
    groups["model"]["kv_bytes_per_token"] = found.kv_bytes_per_token
    if run is not None:
        groups["data"] = data_facts(run.data, init_from=run.init_from)
        groups["changed settings"] = changed_settings(run)
    if run or done:
        groups["training"] = {
            "step": done.get("step", 0),
            "total_steps": found.total_steps,
            "finished": found.finished,
            "tokens": done.get("tokens", 0),
            "train_flops": done.get("flops", 0.0),
            "train_s": done.get("train_s"),
        }
        groups["training"] |= {} if found.mfu is None else {"mfu": found.mfu}
    for name in ("last", "best"):
        if row := getattr(found, name):
            groups[f"{name} validation"] = {
                "step": row["step"],
                "nll": row["validation_nll"],
                "bits_per_byte": row.get("validation_bits_per_byte"),
                "mean_depth": row.get("validation_mean_depth"),
            }
    groups["checkpoints"] = {folder.name: size_of(folder) for folder in found.checkpoints}
    return groups


def changed_settings(run: Any) -> dict[str, Any]:
    """Settings of the run itself that are not the defaults; the model's are shown apart."""
    from mor.settings import flat
    from mor.training.config import TrainConfig

    usual = dict(flat(asdict(TrainConfig())))
    return {
        name: value
        for name, value in flat(asdict(run))
        if name != "out" and not name.startswith("model.") and value != usual[name]
    }
