"""Settings of a training run, and what follows from them: capacities, FLOPs and steps.

This module loads without torch, so that help comes at once; what needs torch is imported where it
is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from mor.data.config import DataConfig
from mor.files import naming, read_json
from mor.model.config import ModelConfig, Recipe, Trained, preset
from mor.run_folder import RunFolder
from mor.settings import (
    Listed,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Settings,
    UnitInterval,
)

Parallel = Literal["ddp", "fsdp"]
TrackerName = Literal["none", "tensorboard", "wandb", "trackio"]
Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Settings, prefix="optim"):
    name: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices of the layers, with AdamW for embedding, head, norms and routers."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"
    warmup: UnitInterval = 0.05
    """Share of the steps in which the rate rises linearly from 0."""
    cooldown: UnitInterval = 0.2
    """Share of the steps in which the trapezoid falls linearly to 0."""
    final_lr: UnitInterval = 0.0
    """Where the schedule ends, as a share of the peak."""
    betas: Listed[tuple[Decay, Decay]] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.1
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient; larger ones are scaled down."""

    def __post_init__(self) -> None:
        if self.warmup + self.cooldown > 1:
            raise ValueError(
                "optim.warmup and optim.cooldown are shares of the run and add up to at most 1, "
                f"got {self.warmup} and {self.cooldown}"
            )


class TrainConfig(Settings):
    model: ModelConfig = field(default_factory=lambda: preset("mini", num_recursions=3))
    """vocab_size is taken from the tokenizer."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    out: str = "runs/mor"
    """Run directory: metrics.jsonl, train.json, checkpoints/."""
    steps: PositiveInt = 500
    """Optimizer steps."""
    flops: PositiveFloat | None = None
    """Training FLOPs to spend (exact count); replaces steps."""
    batch_size: PositiveInt = 16
    """Sequences per forward and rank."""
    accumulate: PositiveInt = 1
    """Forwards per optimizer step."""
    seq_len: PositiveInt = 256
    """Tokens in a training sequence."""
    capacity_warmup_steps: NonNegativeInt = 0
    """Steps in which capacities fall from 1 to their value along a cosine."""
    full_depth_share: UnitInterval = 0.0
    """Share of the steps, evenly spread, in which all tokens take all recursions."""
    recursions_drawn: Listed[tuple[PositiveInt, PositiveInt]] | None = None
    """Least and most recursions of a step in which all tokens take all of them; each number between
    comes equally often. Beyond the model's own, the last one is repeated. None: the model's own."""
    exit_share: UnitInterval = 0.0
    """Share of the sequences of such a step that are also predicted after each recursion: exits
    that are to be used must be trained, and show the router what going on gains."""
    exit_weight: NonNegativeFloat = 0.1
    """Weight of the mean loss of these exits."""
    eval_every: PositiveInt = 100
    """Steps between validations."""
    eval_windows: PositiveInt = 64
    """Sequences that a validation reads."""
    save_minutes: NonNegativeFloat = 5.0
    """Minutes between checkpoints, or 20 times as long as writing the last one took if that is
    more; 0: none by the clock. One is written at the end in any case."""
    save_every: NonNegativeInt = 0
    """Steps between checkpoints, beside those of save_minutes; 0: none by steps."""
    keep: NonNegativeInt = 2
    """Newest checkpoints that are kept; 0 keeps all, of those by the clock only the newest."""
    keep_steps: Listed[tuple[PositiveInt, ...]] = ()
    """Steps whose checkpoints are written and kept as well, such as those that other runs branch
    off."""
    max_skipped: NonNegativeInt = 5
    """Skipped steps in a row (loss or gradient not finite) after which the run stops; it stops at
    once where the weights are not finite."""
    init_from: str | None = None
    """Checkpoint whose weights, model settings and tokenizer a new run starts with, such as one
    that `mor convert` made."""
    train: Trained | None = None
    """added: what later recursions have of their own, and the router, so that the model stays its
    source at depth 1; block: the shared layers too; all: everything. None: added for a deepened
    model and for adapters that act from the first recursion on, else all."""
    source_cache: str | None = None
    """Folder that keeps what the frozen source says of the training text, for train='added' and one
    process: the states that leave the prelude, in half precision, and the loss at depth 1. It takes
    2 * dim + 4 bytes per token; runs and epochs share it."""
    branch_from: str | None = None
    """Checkpoint of another run to start from, with that run's settings."""
    calibrate: bool = True
    """At the end, learn from validation text what depth budgets ask of the router, as `mor
    calibrate` does, if the run has read ten times the tokens that this takes; with one process."""
    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    seed: Seed = 0
    """Of weights and data order."""
    device: str = "auto"
    """auto, cpu, cuda or another PyTorch device. auto: a GPU if there is one."""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Of the products; weights are float32. auto: bfloat16 autocast on CUDA, float32 elsewhere.
    tf32: float32 with shorter factors in products, on CUDA."""
    parallel: Parallel = "ddp"
    """With torchrun: ddp keeps a copy of everything on each rank, fsdp a share."""
    recompute: bool = False
    """Keep no activations inside the layers; the backward pass makes them again."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for the layers. auto: on CUDA, unless it fails; on a CPU it gains little."""
    profile: NonNegativeInt = 0
    """Steps traced after the first few, into trace.json.gz in the run's folder; 0: none."""
    tracker: TrackerName = "none"
    """Where metrics and routing histograms go besides metrics.jsonl; needs the extra [track]."""

    def __post_init__(self) -> None:
        if not self.out.strip():
            raise ValueError("out is empty; name a folder for the run, such as runs/mor")
        if self.parallel == "fsdp" and self.optim.name == "muon":
            raise ValueError(
                "optim.name='muon' needs whole matrices; use parallel='ddp', or optim.name='adamw'"
            )
        if self.init_from is None:
            self.check_model()

    def check_model(self) -> None:
        """Raise ValueError if the run asks for what its model has not. A run that starts from a
        checkpoint is checked when it knows that one's model."""
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"seq_len={self.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}"
            )
        kind = self.model.router.kind
        if self.capacity_warmup_steps and kind in ("fixed", "token_choice", "gain"):
            raise ValueError(f"capacity_warmup_steps needs a router with capacities, not {kind!r}")
        has_added = bool(self.model.deepened or self.model.lora_rank)
        if self.source_cache and self.trained != "added":
            raise ValueError(
                f"source_cache needs a source that stays as it is, and train={self.trained!r} "
                "moves it; leave out source_cache (as a flag: --source-cache None)"
                + (", or take train='added'" if has_added else "")
            )
        if self.train == "added" and not has_added:
            raise ValueError(
                "train='added' is for models with parts of their own for later recursions "
                "(deepened or lora_rank), as mor convert --deepen makes them; this one has none"
            )
        self._check_exits()

    def _check_exits(self) -> None:
        router = self.model.router
        if router.kind == "gain" and (self.full_depth_share or self.exit_share):
            raise ValueError(
                "router.kind='gain' measures gains by itself, with tokens that stop earlier; leave "
                "out full_depth_share and exit_share, or take router.kind='expert_choice' with "
                "router.causal_selection='gain', which learns from exits"
            )
        if self.full_depth_share and router.kind in ("fixed", "token_choice"):
            raise ValueError(
                f"full_depth_share needs a router with capacities, not {router.kind!r}"
            )
        drawn = self.recursions_drawn
        can_draw = self.has_full_steps and self.model.num_recursions > 1
        if drawn and not (can_draw and drawn[0] <= drawn[1]):
            raise ValueError(
                f"recursions_drawn={drawn} names the least and the most recursions of steps in "
                "which all tokens take them; give two numbers that do not fall, and a model with "
                "several recursions and router.kind='fixed' or full_depth_share"
            )
        if drawn and drawn[0] == 1 and self.trained == "added":
            raise ValueError(
                f"recursions_drawn={drawn} has steps of one recursion, in which nothing is used of "
                "what train='added' trains; let it begin at 2"
            )
        if self.exit_share and (self.model.num_recursions == 1 or not self.has_full_steps):
            raise ValueError(
                "exit_share needs several recursions and steps in which all tokens take them; set "
                "full_depth_share, such as 0.5"
            )
        by_gain = router.kind == "expert_choice" and router.causal_selection == "gain"
        if by_gain and not (self.exit_share and router.gain_weight):
            raise ValueError(
                "router.causal_selection='gain' learns from exits alone; set full_depth_share=0.5 "
                "and exit_share=0.25, or take router.kind='gain', which measures gains by itself"
            )

    @property
    def has_full_steps(self) -> bool:
        """Whether there are steps in which all tokens take all recursions."""
        return self.full_depth_share > 0 or min(self.model.capacities) == 1

    def with_model_of(self, checkpoint_config: ModelConfig) -> Self:
        """The same for the model of the checkpoint that it starts from. Raises ValueError for other
        settings of model or tokenizer, and as :meth:`check_model`."""
        if self.model not in (checkpoint_config, type(self)().model):
            raise ValueError(
                f"init_from={self.init_from!r} brings its own model; leave out the settings of "
                "another one"
            )
        if self.data.tokenizer is not None or self.data.vocab_size is not None:
            raise ValueError(
                f"init_from={self.init_from!r} brings its own tokenizer; leave out data.tokenizer "
                "and data.vocab_size"
            )
        found = replace(self, model=checkpoint_config)
        found.check_model()
        return found

    @property
    def trained(self) -> Trained:
        """What is trained."""
        model = self.model
        adapted_once = model.lora_rank and model.lora_from == 1
        return self.train or ("added" if model.deepened or adapted_once else "all")


def training_of(recipe: Recipe, model: ModelConfig) -> dict[str, float]:
    """What a recipe sets of a run beside its model."""
    if recipe != "elastic" or model.num_recursions == 1 or model.router.kind == "fixed":
        return {}
    return {"full_depth_share": 0.5, "exit_share": 0.25, "exit_weight": 0.3}


def capacities_at(config: TrainConfig, step: int) -> tuple[float, ...]:
    """Capacities of a step (from 0), one for each of its recursions: a cosine from 1 to the
    configured ones during warm-up; all 1 in a share of the steps."""
    given, warmup = config.model.capacities, config.capacity_warmup_steps
    if min(given) == 1 or _spread(step, 0.6180339887) < config.full_depth_share:
        return (1.0,) * _recursions_at(config, step)
    if step >= warmup:
        return given
    excess = 0.5 * (1 + math.cos(math.pi * step / warmup))
    return tuple(c + (1 - c) * excess for c in given)


def _recursions_at(config: TrainConfig, step: int) -> int:
    if config.recursions_drawn is None:
        return config.model.num_recursions
    least, most = config.recursions_drawn
    return least + int(_spread(step, 0.7548776662) * (most - least + 1))


def _spread(step: int, ratio: float) -> float:
    """Numbers in [0, 1) that fill it evenly as steps go on, and at no fixed distance, so that what
    is logged every so often shows all of them."""
    return ((step + 1) * ratio) % 1


def exit_rows_at(config: TrainConfig, step: int) -> int:
    """Sequences of each forward of a step that are predicted after each recursion."""
    return _exit_rows(config, capacities_at(config, step))


def _exit_rows(config: TrainConfig, capacities: Sequence[float]) -> int:
    has_exits = min(capacities) == 1 and len(capacities) > 1
    return math.ceil(config.exit_share * config.batch_size) if has_exits else 0


def step_flops(config: TrainConfig, step: int, num_ranks: int = 1) -> float:
    """Training FLOPs of a step, exact for static capacities. Document masks are ignored, and what a
    source_cache saves of the prelude; without static capacities they are expected ones."""
    return _flops_with(config, capacities_at(config, step), num_ranks)


def mean_flops_per_token(config: TrainConfig) -> float:
    """Training FLOPs of a token, over steps of full depth and others as often as they come; warm-up
    and drawn recursions are left out."""
    routed = _flops_with(config, config.model.capacities, 1)
    full = _flops_with(config, (1.0,) * config.model.num_recursions, 1)
    mean = routed + config.full_depth_share * (full - routed)
    return mean / (config.accumulate * config.batch_size * config.seq_len)


def _flops_with(config: TrainConfig, capacities: Sequence[float], num_ranks: int) -> float:
    """Training FLOPs of a step with these capacities."""
    from mor.costs.flops import measuring_flops, train_exit_flops, train_flops

    model, length = config.model, config.seq_len
    each = train_flops(model, length, capacities=capacities, trained=config.trained)
    each += measuring_flops(model, length, source_is_known=config.source_cache is not None)
    exits = train_exit_flops(model, length, len(capacities), trained=config.trained)
    exits *= _exit_rows(config, capacities)
    return config.accumulate * num_ranks * (config.batch_size * each + exits)


def _flops_by_step(config: TrainConfig, num_ranks: int) -> Iterator[float]:
    """Training FLOPs of one step after the other, without end."""
    known: dict[tuple[float, ...], float] = {}
    steps_differ = config.recursions_drawn is not None or config.full_depth_share > 0
    for step in itertools.count():
        if step == config.capacity_warmup_steps and not steps_differ:
            yield from itertools.repeat(step_flops(config, step, num_ranks))
        capacities = capacities_at(config, step)
        if capacities not in known:
            known[capacities] = _flops_with(config, capacities, num_ranks)
        yield known[capacities]


def total_steps(config: TrainConfig, num_ranks: int = 1) -> int:
    """Steps of the whole run. Raises ValueError for a budget that is less than one step."""
    if config.flops is None:
        return config.steps
    left = config.flops
    if left < (first := step_flops(config, 0, num_ranks)):
        raise ValueError(
            f"flops={left:g} is less than the {first:.3g} FLOPs of a single step; raise it, or "
            "lower batch_size, accumulate or seq_len"
        )
    for step, cost in enumerate(_flops_by_step(config, num_ranks)):
        if left < cost / 2:
            return step
        left -= cost
    raise AssertionError("steps do not end")


def total_flops(config: TrainConfig, num_ranks: int = 1, *, after: int = 0) -> float:
    """Training FLOPs of all steps, or of those after so many."""
    steps = total_steps(config, num_ranks)
    return sum(itertools.islice(_flops_by_step(config, num_ranks), after, steps))


def load_config(path: Path) -> TrainConfig:
    """The settings that a run keeps in its folder."""
    values = read_json(path)
    if isinstance(data := values.get("data"), dict):
        data.setdefault("share_of", "documents")  # mor 0.1.0 knew nothing else and wrote nothing
    with naming(path):
        return TrainConfig.from_dict(values)


def settings_of(path: str | Path) -> TrainConfig | None:
    """Settings of the run at ``path``, or of a checkpoint's run; None if it belongs to none. Where
    the run's file is missing they are those that the checkpoint keeps."""
    from mor import checkpoint

    folder = checkpoint.resolve(path)
    run = RunFolder.of(folder)
    if run.settings.is_file():
        return load_config(run.settings)
    return settings_in(folder) if folder in run.checkpoints() else None


def settings_in(folder: Path) -> TrainConfig | None:
    """Settings that a checkpoint keeps; None if it has none: mor 0.1.0 wrote none, and neither does
    a checkpoint without training state."""
    from mor import checkpoint

    if not checkpoint.has_progress(folder):
        return None
    with naming(folder):
        settings = checkpoint.load_progress(folder).get("settings")
        return TrainConfig.from_dict(settings) if settings else None
