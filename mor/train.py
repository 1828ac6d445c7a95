"""Training: one loop for every family, on one device.

text -> batches -> forward (top-k selection) -> LM loss + auxiliary losses -> step -> checkpoint
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from mor import checkpoint, costs
from mor.config import ModelConfig, from_dict, preset
from mor.data import Corpus, DataConfig, DataState, load_corpus
from mor.evaluate import evaluate
from mor.metrics import MetricsLog, ProgressLine
from mor.model import Output, Transformer
from mor.optim import OptimConfig, build_optimizer, learning_rate
from mor.routing import Routing, TokenChoiceRouter


class TrainingError(ValueError):
    """A run that cannot go on; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    model: ModelConfig = field(default_factory=lambda: preset("mini", num_recursions=3, router="expert_choice"))
    """vocab_size is taken from the tokenizer."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    out: str = "runs/mor"
    """Run directory: metrics.jsonl, train.json, checkpoints/."""
    steps: int = 500
    flops: float | None = None
    """Training FLOPs to spend (exact count); replaces steps."""
    batch_size: int = 16
    """Sequences per forward."""
    accumulate: int = 1
    """Forwards per optimizer step."""
    seq_len: int = 256
    capacity_warmup_steps: int = 0
    """Steps in which capacities fall from 1 to their value along a cosine."""
    eval_every: int = 100
    eval_windows: int = 64
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = 2
    """Checkpoints that are kept."""
    log_every: int = 10
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on CUDA, float32 elsewhere."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "seq_len", "eval_every", "eval_windows", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision={self.precision!r} is not known; choose auto, float32 or bfloat16")
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(f"seq_len={self.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}")
        if self.capacity_warmup_steps and self.model.router.kind not in ("expert_choice", "random"):
            raise ValueError(f"capacity_warmup_steps needs a router with capacities, not {self.model.router.kind!r}")


@dataclass
class TrainState:
    """Everything that changes from step to step."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    step: int = 0
    data: DataState = field(default_factory=DataState)
    tokens: int = 0
    flops: float = 0.0
    train_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "position": self.data.position,
            "tokens": self.tokens,
            "flops": self.flops,
            "train_s": self.train_s,
        }

    def load(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.data = saved["step"], DataState(saved["position"])
        self.tokens, self.flops, self.train_s = saved["tokens"], saved["flops"], saved["train_s"]


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Language-model loss, nats per token."""
    aux_losses: dict[str, float]
    grad_norm: float
    tokens_per_recursion: list[int]
    tokens: int
    agreement: float | None
    """Share of router decisions that threshold selection would have made the same way."""

    @property
    def mean_depth(self) -> float:
        return sum(self.tokens_per_recursion) / self.tokens


@dataclass(frozen=True)
class TrainResult:
    path: Path
    """The last checkpoint."""
    state: TrainState
    corpus: Corpus
    finished: bool


def capacities_at(config: TrainConfig, step: int) -> tuple[float, ...]:
    """Capacities of a step (from 0): a cosine from 1 to the configured ones during warm-up."""
    if step >= config.capacity_warmup_steps:
        return config.model.capacities
    excess = 0.5 * (1 + math.cos(math.pi * step / config.capacity_warmup_steps))
    return tuple(c + (1 - c) * excess for c in config.model.capacities)


def step_flops(config: TrainConfig, step: int) -> float:
    """Training FLOPs of a step, exact for static capacities."""
    sequences = config.batch_size * config.accumulate
    return sequences * costs.train_flops(config.model, config.seq_len, capacities=capacities_at(config, step))


def total_steps(config: TrainConfig) -> int:
    if config.flops is None:
        return config.steps
    warm = [step_flops(config, s) for s in range(config.capacity_warmup_steps)]
    left = config.flops - sum(warm)
    return max(1, len(warm) + round(left / step_flops(config, config.capacity_warmup_steps)))


def compute_loss(output: Output, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Total loss to minimise, and the language-model loss alone, both means over tokens."""
    lm_loss = F.cross_entropy(output.logits_BTV.flatten(0, 1).float(), targets_BT.flatten())
    return lm_loss + output.routing.weighted_loss, lm_loss


def train_step(config: TrainConfig, state: TrainState, batches: Iterator[Any], total: int) -> StepResult:
    """One optimizer step over ``config.accumulate`` batches."""
    model, device = state.model, state.model.embedding.weight.device
    capacities, routings = capacities_at(config, state.step), []
    lm_sum, aux = 0.0, dict[str, float]()
    for _ in range(config.accumulate):
        batch, state.data = next(batches)
        with _autocast(config, device):
            output = model(batch.tokens_BT.to(device), selection="topk", capacities=capacities)
            loss, lm_loss = compute_loss(output, batch.targets_BT.to(device))
        (loss / config.accumulate).backward()
        lm_sum += lm_loss.item() / config.accumulate
        for name, auxiliary in output.routing.losses.items():
            aux[name] = aux.get(name, 0.0) + auxiliary.value.item() / config.accumulate
        routings.append(output.routing)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip).item()
    if not (math.isfinite(lm_sum) and math.isfinite(grad_norm)):
        raise TrainingError(
            f"the {'loss' if not math.isfinite(lm_sum) else 'gradient'} is not finite at step {state.step}; "
            f"lower optim.lr (now {config.optim.lr:g}) or lengthen optim.warmup"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, state.step, total)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    _balance(model, routings)
    state.step += 1
    state.tokens += config.batch_size * config.accumulate * config.seq_len
    state.flops += step_flops(config, state.step - 1)
    counts = [sum(c) for c in zip(*(r.tokens_per_recursion() for r in routings), strict=True)]
    return StepResult(lm_sum, aux, grad_norm, counts, sum(len(r.tokens) for r in routings), agreement(model, routings))


def _autocast(config: TrainConfig, device: torch.device) -> Any:
    on = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if on else nullcontext()


def _balance(model: Transformer, routings: Sequence[Routing]) -> None:
    router = model.recursions.router
    if isinstance(router, TokenChoiceRouter) and router.config.balancing == "loss_free":
        choices = torch.cat([r.choice_M for r in routings if r.choice_M is not None])
        router.update_bias(torch.bincount(choices - 1, minlength=router.num_recursions))


@torch.no_grad()
def agreement(model: Transformer, routings: Sequence[Routing]) -> float | None:
    """Share of candidates that threshold selection treats as top-k did (expert-choice)."""
    limits = getattr(model.recursions.router, "threshold_R", None)
    if limits is None:
        return None
    same = count = 0
    for routing in routings:
        for step in routing.steps:
            if step.causal_logit_C is None or routing.capacities[step.recursion] == 1:
                continue
            selected_M = routing.selected_M(step.recursion)
            chosen_C = selected_M if step.candidate_C is None else selected_M[step.candidate_C]
            same += int((chosen_C == (step.causal_logit_C.sigmoid() > limits[step.recursion])).sum())
            count += chosen_C.numel()
    return same / count if count else None


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    corpus: Corpus | None = None,
    console: Console | None = None,
    label: str = "train",
) -> TrainResult:
    """Train a model as configured and save it under ``config.out``.

    resume: continue the run in ``config.out``. Ctrl-C finishes the step, saves and returns with
    ``finished=False``. Raises TrainingError if the loss stops being finite.
    """
    console, out = console or Console(), Path(config.out)
    if not resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} already holds a run; resume it with --resume, choose another --out, or delete it")
    saved = checkpoint.load(out) if resume else None
    corpus = corpus or load_corpus(config.data, saved.tokenizer if saved else None)
    config = dataclasses.replace(config, model=config.model.replace(vocab_size=corpus.tokenizer.vocab_size))
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    model = Transformer(config.model).init_weights(config.seed).to(device)
    state = TrainState(model, build_optimizer(model, config.optim))
    if saved:
        model.load_state_dict(saved.model.state_dict())
        state.load(checkpoint.load_training_state(out))
    log = MetricsLog(out / "metrics.jsonl", truncate_to=state.step if resume else None)
    (out / "train.json").write_text(json.dumps(dataclasses.asdict(config), indent=2))
    total = total_steps(config)
    with ProgressLine(console, total, state.step, label) as progress, _interruptible() as interrupted:
        finished = _loop(config, state, corpus, total, log, progress, interrupted)
    path = _save(config, state, corpus, out)
    return TrainResult(path, state, corpus, finished)


def _loop(
    config: TrainConfig,
    state: TrainState,
    corpus: Corpus,
    total: int,
    log: MetricsLog,
    progress: ProgressLine,
    interrupted: list[bool],
) -> bool:
    """Steps until ``total`` or an interruption; True if it got to the end."""
    batches = corpus.train.batches(config.batch_size, config.seq_len, seed=config.seed, state=state.data)
    warned: str | None = None
    while state.step < total:
        started = time.perf_counter()
        result = train_step(config, state, batches, total)
        elapsed_s = time.perf_counter() - started
        state.train_s += elapsed_s
        if state.step % config.log_every == 0 or state.step == total:
            _log_step(config, state, result, elapsed_s, total, log)
        rate = result.tokens / elapsed_s
        progress.update(state.step, f"loss {result.loss:.3f} · {rate:,.0f} tok/s · depth {result.mean_depth:.2f}")
        if state.step % config.eval_every == 0 or state.step == total:
            found = evaluate(state.model, corpus.validation, seq_len=config.seq_len, max_windows=config.eval_windows)
            message = collapse_message(found.share_per_recursion)
            if message and message != warned:
                progress.note(f"warning: step {state.step}: {message}")
            warned = message
            log.write(
                step=state.step,
                flops=state.flops,
                tokens=state.tokens,
                validation_nll=found.nll,
                validation_bits_per_byte=found.bits_per_byte,
                validation_mean_depth=found.mean_depth,
                validation_share_per_recursion=found.share_per_recursion,
            )
            if not progress.console.is_terminal:
                progress.note(
                    f"{progress.label} {state.step}/{total} · loss {result.loss:.3f} · "
                    f"{found.bits_per_byte:.3f} bits/byte · depth {found.mean_depth:.2f} · {rate:,.0f} tok/s"
                )
        if config.save_every and state.step % config.save_every == 0 and state.step < total:
            _save(config, state, corpus, Path(config.out))
        if interrupted:
            progress.note(f"interrupted: saved after step {state.step}; continue with --resume")
            return state.step >= total
    return True


def collapse_message(share_per_recursion: Sequence[float]) -> str | None:
    """Plain words if causal selection leaves a recursion without tokens."""
    empty = [r + 1 for r, share in enumerate(share_per_recursion) if share == 0]
    if not empty:
        return None
    return (
        f"no validation token takes recursion {', '.join(map(str, empty))}: the router collapsed. "
        "For token-choice raise router.balancing_weight; for expert-choice raise router.selection_weight "
        "or lower optim.lr"
    )


def _log_step(
    config: TrainConfig, state: TrainState, result: StepResult, elapsed_s: float, total: int, log: MetricsLog
) -> None:
    log.write(
        step=state.step,
        flops=state.flops,
        tokens=state.tokens,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=learning_rate(config.optim, state.step - 1, total),
        mean_depth=result.mean_depth,
        share_per_recursion=[c / result.tokens for c in result.tokens_per_recursion],
        agreement=result.agreement,
        tokens_per_s=result.tokens / elapsed_s,
        **result.aux_losses,
    )


def _save(config: TrainConfig, state: TrainState, corpus: Corpus, out: Path) -> Path:
    path = out / "checkpoints" / f"step-{state.step:08d}"
    checkpoint.save(path, state.model, corpus.tokenizer, training_state=state.to_dict())
    for old in sorted((out / "checkpoints").glob("step-*"))[: -config.keep]:
        checkpoint.remove(old)
    return path


@contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """A list that the first Ctrl-C fills; the second one interrupts as usual."""
    asked: list[bool] = []

    def handle(*_: object) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: whoever runs us there handles Ctrl-C
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def load_config(path: Path) -> TrainConfig:
    """A run's train.json."""
    return from_dict(TrainConfig, json.loads(path.read_text()))
