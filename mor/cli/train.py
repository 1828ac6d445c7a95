"""mor train"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import arg

from mor.cli.model import ModelChoice
from mor.cli.show import flag
from mor.files import naming, read_json, read_toml
from mor.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one model. Settings come from --config (TOML), then the model choice, then single
    flags."""

    config: Path | None = None
    """TOML file with the settings below; an earlier run's train.json works too."""
    resume: bool = False
    """Continue the run in --out with the settings it was started with."""
    cooldown_steps: int | None = None
    """With --branch-from: steps in which the learning rate decays from there to its end."""
    choice: Annotated[ModelChoice, arg(name="")] = field(default_factory=ModelChoice)
    settings: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)

    def run(self, console: Console) -> None:
        from mor.training.config import branch, load_config
        from mor.training.loop import train

        settings = self.settings
        if self.cooldown_steps is not None and settings.branch_from is not None:
            settings = branch(
                settings.branch_from, cooldown_steps=self.cooldown_steps, out=settings.out
            )
        if self.resume:
            saved = Path(settings.out) / "train.json"
            if not saved.is_file():
                raise ValueError(f"{settings.out} holds no run to resume (no train.json)")
            settings = replace(load_config(saved), out=settings.out)
        result = train(settings, resume=self.resume, console=console)
        if result.state.ranks.is_first:
            console.print(f"checkpoint: {result.path}", highlight=False, soft_wrap=True)


def train_defaults(arguments: list[str]) -> Train:
    """Defaults of `mor train` as its --config and model choice make them, so that single flags
    refine those."""

    @dataclass(frozen=True, kw_only=True)
    class Start:
        config: Path | None = None
        choice: Annotated[ModelChoice, arg(name="")] = field(default_factory=ModelChoice)

    given = {
        a.split("=")[0].removeprefix("--").replace("-", "_")
        for a in arguments
        if a.startswith("--")
    }
    for mode, allowed in {"resume": ["out"], "branch_from": ["cooldown_steps", "out"]}.items():
        if mode in given and (ignored := given - {mode, "help", *allowed}):
            flags, takes = (", ".join(map(flag, names)) for names in (sorted(ignored), allowed))
            raise ValueError(
                f"{flag(mode)} keeps the settings the run was started with and takes only {takes}; "
                f"leave out {flags}"
            )
    if ("branch_from" in given) != ("cooldown_steps" in given):
        raise ValueError("--branch-from CHECKPOINT and --cooldown-steps N go together")
    start, _ = tyro.cli(Start, args=arguments, return_unknown_args=True, add_help=False)
    if start.config is None:
        settings = TrainConfig(model=start.choice.build())
    else:
        read = read_json if start.config.suffix == ".json" else read_toml
        values = read(start.config)
        with naming(start.config):
            settings = TrainConfig.from_dict(values)
        if given & set(ModelChoice.__dataclass_fields__):
            settings = replace(settings, model=start.choice.build())
    return Train(config=start.config, choice=start.choice, settings=settings)
