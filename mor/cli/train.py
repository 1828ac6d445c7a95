"""mor train"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Self

import tyro
from rich.console import Console
from tyro.conf import Fixed, Suppress, arg

from mor.cli.choice import ModelChoice
from mor.cli.command import Command
from mor.cli.flags import print_short_help
from mor.cli.show import flag
from mor.files import naming, read_json, read_toml
from mor.run_folder import RunFolder
from mor.settings import PositiveInt, Settings
from mor.training.config import TrainConfig, load_config, total_flops, total_steps
from mor.training.resume import RESUMABLE, branch

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
    """The flags that say where settings come from. Most others refine what is found there."""

    config: Path | None = None
    resume: bool = False
    branch_from: str | None = None
    cooldown_steps: PositiveInt | None = None

    def refuse(self, named: Sequence[str]) -> None:
        """Raise ValueError for flags that would make a continued run another one. named: the
        settings that have flags."""
        takes = {"resume": RESUMABLE, "branch_from": ("cooldown_steps", "steps", "optim.lr", "out")}
        for mode, allowed in takes.items():
            ignored = [flag(name) for name in sorted(set(named)) if name not in (mode, *allowed)]
            if getattr(self, mode) and ignored:
                raise ValueError(
                    f"{flag(mode)} keeps the settings the run was started with and takes only "
                    f"{', '.join(map(flag, allowed))}; leave out {', '.join(ignored)}"
                )
        if self.branch_from is None and self.cooldown_steps is not None:
            raise ValueError("--branch-from CHECKPOINT and --cooldown-steps N go together")
        if self.branch_from is not None and (self.cooldown_steps is None) != ("steps" in named):
            raise ValueError(
                "--branch-from takes --cooldown-steps N, to let the learning rate decay from "
                "there, or --steps N, to go on to that many steps in all"
            )

    def settings(self, choice: ModelChoice, *, chosen: bool) -> TrainConfig:
        """chosen: the model was chosen by flags, which win over the file."""
        if self.config is None:
            return TrainConfig(model=choice.build())
        values = (read_json if self.config.suffix == ".json" else read_toml)(self.config)
        with naming(self.config):
            found = TrainConfig.from_dict(values)
        return replace(found, model=choice.build()) if chosen else found


def settings_named(arguments: Sequence[str]) -> tuple[str, ...]:
    """Dotted names of the settings that have flags among these words."""
    flags = (word.split("=")[0] for word in arguments if word.startswith("--"))
    return tuple(name.removeprefix("--").removeprefix("no-").replace("-", "_") for name in flags)


class Train(Command):
    """Train one model. Settings: --config (TOML), then the model choice, then single flags."""

    config: Path | None = None
    """TOML file of settings; those that an earlier run wrote work too."""
    resume: bool = False
    """Continue the run in --out with the settings it was started with; with --steps or --flops to
    another length."""
    cooldown_steps: PositiveInt | None = None
    """With --branch-from: steps in which the learning rate decays from there to its end; with
    --steps instead, the branch goes on as a run planned for that many steps."""
    choice: Annotated[ModelChoice, arg(name="")] = field(default_factory=ModelChoice)
    settings: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
    named: Annotated[tuple[str, ...], Suppress, Fixed] = ()

    @classmethod
    def read(cls, arguments: list[str], program: str, *, default: Self | None = None) -> Self:
        if "--help-all" in arguments:
            arguments = ["--help"]
        elif {"-h", "--help"} & set(arguments):
            print_short_help(cls(), program, USUAL)
            raise SystemExit(0)
        start, rest = tyro.cli(
            Start, args=arguments, prog=program, return_unknown_args=True, add_help=False
        )
        if "--help" not in arguments:
            start.refuse(settings_named(arguments))
        choice, others = tyro.cli(
            ModelChoice, args=rest, prog=program, return_unknown_args=True, add_help=False
        )
        settings = start.settings(choice, chosen=len(others) < len(rest))
        named = settings_named(arguments)
        default = default or cls(config=start.config, choice=choice, settings=settings, named=named)
        return super().read(arguments, program, default=default)

    def run(self, console: Console) -> None:
        from mor.training.loop import train

        settings = self._settings()
        if int(os.environ.get("RANK", "0")) == 0:
            console.print(header(settings), highlight=False, soft_wrap=True)
        result = train(settings, resume=self.resume, console=console)
        if result.state.ranks.is_first:
            console.print(f"checkpoint: {result.path}", highlight=False, soft_wrap=True)

    def _settings(self) -> TrainConfig:
        given, named = self.settings, set(self.named)
        if self.resume:
            saved = RunFolder(Path(given.out)).settings
            if not saved.is_file():
                raise ValueError(f"{given.out} holds no run to resume (no {saved.name})")
            anew: dict[str, Any] = {"flops": None} if "steps" in named else {}
            anew |= {name: getattr(given, name) for name in named & set(RESUMABLE)}
            return replace(load_config(saved), **anew | {"out": given.out})
        if given.branch_from is not None and named & {"steps", "cooldown_steps"}:
            return branch(
                given.branch_from,
                cooldown_steps=self.cooldown_steps,
                steps=given.steps if "steps" in named else None,
                lr=given.optim.lr if "optim.lr" in named else None,
                out=given.out,
            )
        return given


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
