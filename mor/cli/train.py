"""mor train"""

from __future__ import annotations

import os
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Self

from rich.console import Console
from tyro.conf import arg

from mor.cli.choice import ModelChoice
from mor.cli.command import Command, parse
from mor.cli.flags import print_short_help
from mor.cli.show import flag
from mor.files import naming, read_json, read_toml
from mor.interruption import EXIT_CODE
from mor.run_folder import RunFolder
from mor.settings import PositiveInt, Settings
from mor.training.config import TrainConfig, branch, load_config, total_flops, total_steps

USUAL = (
    "preset",
    "num_recursions",
    "recipe",
    "router",
    "kv_strategy",
    "data.path",
    "out",
    "steps",
    "flops",
    "batch_size",
    "seq_len",
    "optim.lr",
    "device",
    "seed",
    "resume",
    "config",
)


class Start(Settings):
    """The flags that say where settings come from. All others refine what is found there."""

    config: Path | None = None
    resume: bool = False
    branch_from: str | None = None
    cooldown_steps: PositiveInt | None = None
    out: str | None = None

    def refuse(self, others: list[str]) -> None:
        """Raise ValueError for flags that a continued run would ignore."""
        for mode, takes in {"resume": ["out"], "branch_from": ["cooldown_steps", "out"]}.items():
            rest = set(self.__dataclass_fields__) - {mode, *takes}
            ignored = [flag(name) for name in sorted(rest) if getattr(self, name)]
            ignored += [word.split("=")[0] for word in others if word.startswith("--")]
            if getattr(self, mode) and ignored:
                raise ValueError(
                    f"{flag(mode)} keeps the settings the run was started with and takes only "
                    f"{', '.join(map(flag, takes))}; leave out {', '.join(ignored)}"
                )
        if (self.branch_from is None) != (self.cooldown_steps is None):
            raise ValueError("--branch-from CHECKPOINT and --cooldown-steps N go together")

    def settings(self, choice: ModelChoice, *, chosen: bool) -> TrainConfig:
        """chosen: the model was chosen by flags, which win over the file."""
        if self.config is None:
            return TrainConfig(model=choice.build())
        values = (read_json if self.config.suffix == ".json" else read_toml)(self.config)
        with naming(self.config):
            found = TrainConfig.from_dict(values)
        return replace(found, model=choice.build()) if chosen else found


class Train(Command):
    """Train one model. Settings: --config (TOML), then the model choice, then single flags."""

    config: Path | None = None
    """TOML file of settings; those that an earlier run wrote work too."""
    resume: bool = False
    """Continue the run in --out with the settings it was started with."""
    cooldown_steps: PositiveInt | None = None
    """With --branch-from: steps in which the learning rate decays from there to its end."""
    choice: Annotated[ModelChoice, arg(name="")] = field(default_factory=ModelChoice)
    settings: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)

    @classmethod
    def read(cls, arguments: list[str], program: str, *, default: Self | None = None) -> Self:
        if "--help-all" in arguments:
            arguments = ["--help"]
        elif {"-h", "--help"} & set(arguments):
            print_short_help(cls(), program, USUAL)
            raise SystemExit(0)
        start, rest = parse(Start, arguments, program, return_unknown_args=True, add_help=False)
        if "--help" not in arguments:
            start.refuse(rest)
        choice, others = parse(ModelChoice, rest, program, return_unknown_args=True, add_help=False)
        settings = start.settings(choice, chosen=len(others) < len(rest))
        default = default or cls(config=start.config, choice=choice, settings=settings)
        return super().read(arguments, program, default=default)

    def run(self, console: Console) -> None:
        from mor.training.loop import train

        settings = self._settings()
        if int(os.environ.get("RANK", "0")) == 0:
            console.print(header(settings), highlight=False, soft_wrap=True)
        result = train(settings, resume=self.resume, console=console)
        if result.state.ranks.is_first:
            console.print(f"checkpoint: {result.path}", highlight=False, soft_wrap=True)
        if not result.finished:
            raise SystemExit(EXIT_CODE)

    def _settings(self) -> TrainConfig:
        out = self.settings.out
        if self.resume:
            saved = RunFolder(Path(out)).settings
            if not saved.is_file():
                raise ValueError(f"{out} holds no run to resume (no {saved.name})")
            return replace(load_config(saved), out=out)
        if self.cooldown_steps is not None and self.settings.branch_from is not None:
            return branch(self.settings.branch_from, cooldown_steps=self.cooldown_steps, out=out)
        return self.settings


def header(settings: TrainConfig) -> str:
    """What is about to be trained, on what and for how long, in one line."""
    from mor.cli.describe import corpus_name
    from mor.costs.flops import unique_params
    from mor.data.stream import vocab_size

    model = settings.model.replace(vocab_size=vocab_size(settings.data))
    settings = replace(settings, model=model)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    steps = total_steps(settings, ranks)
    tokens = settings.batch_size * settings.accumulate * settings.seq_len * ranks
    return (
        f"{model.family}: {unique_params(model):,} parameters, {model.layout_name} · "
        f"{corpus_name(settings.data)} · {steps:,} steps × {tokens:,} tokens = "
        f"{steps * tokens:,} tokens · {total_flops(settings, ranks):.3g} training FLOPs"
    )
