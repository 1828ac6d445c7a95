"""mor train"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Self

from rich.console import Console
from tyro.conf import Fixed, Suppress, arg

from mor.cli.choice import ModelChoice
from mor.cli.command import Command, parse
from mor.cli.flags import print_short_help
from mor.cli.show import flag
from mor.data.config import BPE
from mor.data.manifest import is_prepared
from mor.files import naming, read_json, read_toml
from mor.interruption import EXIT_CODE
from mor.model.config import NoEffect, RouterKind
from mor.progress import showing
from mor.settings import PositiveInt, Settings
from mor.training.config import TrainConfig, total_flops, total_steps, training_of
from mor.training.resume import ANEW, RESUMABLE, branch, settings_to_resume

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
    init_from: str | None = None
    cooldown_steps: PositiveInt | None = None
    out: str = TrainConfig.out

    def refuse(self, named: Sequence[str]) -> None:
        """Raise ValueError for flags that would make a continued run another one. named: the
        settings that have flags."""
        branched = ("cooldown_steps", "steps", "optim.lr", *ANEW)
        takes = {"resume": RESUMABLE, "branch_from": branched}
        for mode, allowed in takes.items():
            ignored = [flag(name) for name in sorted(set(named)) if name not in (mode, *allowed)]
            if getattr(self, mode) and ignored:
                raise ValueError(
                    f"{flag(mode)} keeps the settings the run was started with and takes only "
                    f"{', '.join(map(flag, allowed))}; leave out {', '.join(ignored)}"
                )
        chosen = [
            flag(name) for name in sorted(set(named)) if name in ModelChoice.__dataclass_fields__
        ]
        chosen += [flag(name) for name in sorted(set(named)) if name.startswith("model.")]
        if self.init_from and chosen:
            raise ValueError(
                f"--init-from takes the model of the checkpoint as it is; leave out "
                f"{', '.join(chosen)}"
            )
        if self.branch_from is None and self.cooldown_steps is not None:
            raise ValueError("--branch-from CHECKPOINT and --cooldown-steps N go together")
        if self.branch_from is not None and (self.cooldown_steps is None) != ("steps" in named):
            raise ValueError(
                "--branch-from takes --cooldown-steps N, to let the learning rate decay from "
                "there, or --steps N, to go on to that many steps in all"
            )

    def values(self) -> dict[str, Any]:
        """What the file says. Raises ValueError if it is no table of settings."""
        if self.config is None:
            return {}
        found = (read_json if self.config.suffix == ".json" else read_toml)(self.config)
        if not isinstance(found, dict):
            raise ValueError(f"{self.config}: must be a table of settings, got {found!r}")
        return found

    def settings(self, choice: ModelChoice, chosen: list[str]) -> TrainConfig:
        """What flags refine: of the run that goes on, of the file, or the defaults. chosen: flags
        that choose a model. A preset wins over the model of the file, other flags would change more
        than they say. Raises ValueError for them."""
        if self.resume:
            with suppress(ValueError):  # which is said when the run is to begin
                return settings_to_resume(self.out)
        values = self.values()
        if chosen and "model" in values and "--preset" not in chosen:
            raise ValueError(
                f"{', '.join(chosen)}: {self.config} has a model already; refine it with flags "
                "such as --model.num-recursions, or choose another one with --preset"
            )
        if chosen and "model" in values:
            warnings.warn(f"--preset takes the place of model in {self.config}", stacklevel=2)
        if chosen or self.config is None:
            model = choice.build()
            values = training_of(choice.recipe, model) | values | {"model": model}
        if self.config is None:
            return TrainConfig.from_dict(values)
        with naming(self.config):
            if self.config.suffix == ".toml" and values.get("flops") and "steps" in values:
                raise ValueError("steps and flops both say how long; leave out one of them")
            return TrainConfig.from_dict(values)


class Refined(Settings):
    """A flag below --model that the recipe depends on."""

    kind: Annotated[RouterKind | None, arg(name="model.router.kind")] = None


def _names(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of the settings in a file."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _below(group: str, names: str) -> str:
    return " ".join(f"{group}.{name}" for name in names.split())


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
        warnings.simplefilter("ignore", NoEffect)  # without_effect knows what was given
        if "--help-all" in arguments:
            arguments = ["--help"]
        elif {"-h", "--help"} & set(arguments):
            print_short_help(cls(), program, USUAL)
            raise SystemExit(0)
        start, rest = parse(Start, arguments, program, return_unknown_args=True, add_help=False)
        named = tuple(super().given(arguments))
        if "--help" not in arguments:
            start.refuse(named)
        choice, rest = parse(ModelChoice, rest, program, return_unknown_args=True, add_help=False)
        refined, _ = parse(Refined, rest, program, return_unknown_args=True, add_help=False)
        given = cls.given(arguments)
        if refined.kind is not None and choice.router is None:
            choice = replace(choice, router=refined.kind)  # so that the recipe is that router's
        chosen = [given[name] for name in ModelChoice.__dataclass_fields__ if name in given]
        settings = start.settings(choice, chosen)
        default = default or cls(config=start.config, choice=choice, settings=settings, named=named)
        command = super().read(arguments, program, default=default)
        command.refuse_contradictions(given)
        return command

    @classmethod
    def given(cls, arguments: list[str]) -> dict[str, str]:
        start, _ = parse(Start, arguments, "mor train", return_unknown_args=True, add_help=False)
        of_file = {name: f"{name} in {start.config}" for name in _names(start.values())}
        written_by_us = start.config is not None and start.config.suffix == ".json"
        return ({} if written_by_us else of_file) | super().given(arguments)

    def without_effect(self) -> Iterator[tuple[str, str]]:
        from mor.data.problems import PREFIX
        from mor.data.word_problems import WORDS_PREFIX

        settings, data = self.settings, self.settings.data
        if "WORLD_SIZE" not in os.environ:
            yield "parallel", "without torchrun"
        if self.resume or settings.branch_from:
            return  # the other settings are those of the run, which are not read yet
        if settings.init_from is None:  # which brings its own model
            yield from self._of_model()
        if reason := _too_late(settings):
            yield "keep_steps", reason
        if settings.flops is not None:
            yield "steps", "with flops, which decide how many there are"
        if settings.optim.schedule == "cosine":
            yield "optim.cooldown", "with the cosine schedule"
        text = "text_field validation_share share_of"
        if (data.path or "").startswith((PREFIX, WORDS_PREFIX)):
            yield f"{_below('data', text)} data.validation_path", "with a task, which has its own"
        elif data.path and is_prepared(data.path):
            yield _below("data", text), "with prepared data"
        elif data.tokenizer not in (None, BPE):
            yield "data.vocab_size", f"with the tokenizer {data.tokenizer!r}, which has its own"
        if data.validation_path:
            yield "data.validation_share", "with a validation_path"

    def _of_model(self) -> Iterator[tuple[str, str]]:
        settings = self.settings
        for name, reason in settings.model.without_effect():
            yield f"{name} model.{name}", reason
        if self.config is None:
            yield from self.choice.without_effect()
        if self.config or "model.vocab_size" in self.named:
            used = with_vocabulary(settings).model.vocab_size
            if settings.model.vocab_size != used:
                yield "model.vocab_size", f"beside the tokenizer, which has {used:,} tokens"

    def refuse_contradictions(self, given: Mapping[str, str]) -> None:
        """Raise ValueError if a flag that chooses the model and one that refines it differ."""
        model = self.settings.model
        for name, found in {
            "num_recursions": model.num_recursions,
            "router": model.router.kind,
            "kv_strategy": model.kv_strategy,
            "num_layers": model.num_layers,
        }.items():
            asked = getattr(self.choice, name)
            if given.get(name, "").startswith("--") and asked not in (None, found):
                raise ValueError(
                    f"{flag(name)} {asked} and the flags below --model say different things: "
                    f"by those it is {found}; leave one of them out"
                )

    def run(self, console: Console) -> None:
        from mor.training.loop import train

        settings = self._settings()
        if self.resume and "keep_steps" in self.named and (reason := _too_late(settings)):
            raise ValueError(f"--keep-steps has no effect {reason}")
        settings = replace(settings, data=settings.data.located())
        result = train(settings, resume=self.resume, console=console, announce=header)
        with showing(set()):
            if result.state.ranks.is_first:
                console.print(f"checkpoint: {result.path}", highlight=False, soft_wrap=True)
        if not result.finished:
            raise SystemExit(EXIT_CODE)

    def _settings(self) -> TrainConfig:
        given, named = self.settings, set(self.named)
        if self.resume:
            anew: dict[str, Any] = {"flops": None} if "steps" in named else {}
            anew |= {name: getattr(given, name) for name in named & set(RESUMABLE)}
            return replace(settings_to_resume(given.out), **anew | {"out": given.out})
        if given.branch_from is not None and named & {"steps", "cooldown_steps"}:
            made = branch(
                given.branch_from,
                cooldown_steps=self.cooldown_steps,
                steps=given.steps if "steps" in named else None,
                lr=given.optim.lr if "optim.lr" in named else None,
                out=given.out,
            )
            return replace(made, **{name: getattr(given, name) for name in named & set(ANEW)})
        return given


def with_vocabulary(settings: TrainConfig) -> TrainConfig:
    """The same with a model as large as the tokenizer makes it, or that of the checkpoint it starts
    from."""
    from mor import checkpoint
    from mor.data.corpus import vocab_size

    if settings.init_from:
        return settings.with_model_of(
            checkpoint.read_config(checkpoint.resolve(settings.init_from))
        )
    model = settings.model.replace(vocab_size=vocab_size(settings.data))
    return replace(settings, model=model)


def _too_late(settings: TrainConfig) -> str:
    """Why some of the steps to keep have no effect; empty if they all have."""
    if not settings.keep_steps:
        return ""
    last = total_steps(with_vocabulary(settings), int(os.environ.get("WORLD_SIZE", "1")))
    late = max(settings.keep_steps)
    return "" if late <= last else f"for step {late:,}, as the run ends at step {last:,}"


def header(settings: TrainConfig, ranks: int = 1) -> str:
    """What is about to be trained, on what and for how long, in one line. settings: with the
    vocabulary of the data, as they will be trained."""
    from mor.cli.describe import corpus_name
    from mor.costs.flops import unique_params

    model = settings.model
    steps = total_steps(settings, ranks)
    tokens = settings.batch_size * settings.accumulate * settings.seq_len * ranks
    return (
        f"{model.family}: {unique_params(model):,} parameters, {model.layout_name} · "
        f"{corpus_name(settings.data)} · {steps:,} steps × {tokens:,} tokens = "
        f"{steps * tokens:,} tokens · {total_flops(settings, ranks):.3g} training FLOPs"
    )
