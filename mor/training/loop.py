"""Training: one loop for every family, on one process or many.

text -> batches -> steps -> metrics, validation, checkpoints in the run's folder
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from mor import checkpoint
from mor.data.stream import Corpus, load_corpus
from mor.device import preferred_kernels
from mor.evaluation.nll import Evaluation, evaluate
from mor.files import verify, write_json
from mor.interruption import interruptible
from mor.model.transformer import Transformer
from mor.progress import ProgressBar
from mor.run_folder import RunFolder
from mor.training import distributed, sharded_state
from mor.training.config import TrainConfig, total_steps
from mor.training.distributed import Ranks, reshard, spread
from mor.training.log import MetricsLog, health_text
from mor.training.optim import build_optimizers, learning_rate
from mor.training.step import StepResult, TrainState, train_step
from mor.training.trackers import TRACKERS, Tolerant, Tracker, routing_histograms


class TrainingError(ValueError):
    """A run that cannot continue; the message says why and what to do."""


@dataclass(frozen=True)
class TrainResult:
    path: Path
    """The last checkpoint."""
    state: TrainState
    corpus: Corpus
    finished: bool


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    corpus: Corpus | None = None,
    console: Console | None = None,
    label: str = "train",
) -> TrainResult:
    """Train a model as configured and save it under ``config.out``.

    resume: continue the run in ``config.out`` from its newest checkpoint, or start it if there is
    none yet. Ctrl-C or SIGTERM finishes the step, saves and returns with ``finished=False``; a
    second one raises KeyboardInterrupt. Raises TrainingError if the loss stays non-finite or a
    checkpoint cannot be written, ValueError if the newest one is damaged or another process trains
    in ``config.out``.
    """
    run = RunFolder(Path(config.out))
    with distributed.ranks(config.device) as ranks, _alone_in(run, ranks):
        shown = (console or Console()) if ranks.is_first else Console(quiet=True)
        return _prepare(config, run, ranks, resume, corpus, shown, label).train()


@contextmanager
def _alone_in(run: RunFolder, ranks: Ranks) -> Iterator[None]:
    """The first rank holds the run's lock for all; if it cannot, every rank raises its error."""
    with ExitStack() as stack:
        error = None
        if ranks.is_first:
            try:
                stack.enter_context(run.lock())
            except ValueError as taken:
                error = taken
        if error := ranks.from_first(error):
            raise error
        yield


def _prepare(
    config: TrainConfig,
    run: RunFolder,
    ranks: Ranks,
    resume: bool,
    corpus: Corpus | None,
    console: Console,
    label: str,
) -> Trainer:
    """Everything that a run needs, to start or to continue where it was interrupted."""
    if ranks.from_first(not resume and run.is_begun):
        raise ValueError(
            f"{run.path} already holds a run; resume it with --resume, choose another --out, or "
            "delete it"
        )
    start = ranks.from_first(_start(config, run, resume, console) if ranks.is_first else None)
    saved = checkpoint.load(start) if start else None
    corpus = corpus or load_corpus(config.data, saved.tokenizer if saved else None)
    config = dataclasses.replace(
        config, model=config.model.replace(vocab_size=corpus.tokenizer.vocab_size)
    )
    model = saved.model.train() if saved else _fresh_model(config, corpus)
    state = _on_ranks(config, model.to(ranks.device), ranks)
    if start:
        state.load(start)
    tracker = _tracker(config, state)
    log = MetricsLog(run, step=state.step, active=ranks.is_first, tracker=tracker)
    if ranks.is_first:
        write_json(run.settings, dataclasses.asdict(config))
    total = total_steps(config, ranks.size)
    progress = ProgressBar(console, label, total=total, done=state.step, counted=True)
    return Trainer(config, state, corpus, run, log, progress, total)


def _start(config: TrainConfig, run: RunFolder, resume: bool, console: Console) -> Path | None:
    """The checkpoint that a run begins with; None for fresh weights."""
    run.tidy()
    if resume:
        if newest := run.newest_intact():
            return newest
        console.print(
            f"{run.path} has no checkpoint yet: starting at its beginning", highlight=False
        )
    if config.branch_from is None:
        return None
    start = checkpoint.resolve(config.branch_from)
    verify(start)
    return start


def _fresh_model(config: TrainConfig, corpus: Corpus) -> Transformer:
    model = Transformer(config.model).init_weights(config.seed)
    if model.router.needs_token_counts:
        model.router.fit(corpus.train.token_counts(config.model.vocab_size, config.seq_len))
    return model


def _on_ranks(config: TrainConfig, model: Transformer, ranks: Ranks) -> TrainState:
    if config.compile == "on" or (config.compile == "auto" and ranks.device.type == "cuda"):
        model.compile_blocks()
    forward = spread(model, ranks, config.parallel)
    return TrainState(model, build_optimizers(model, config.optim), ranks, forward)


def _tracker(config: TrainConfig, state: TrainState) -> Tracker:
    make = TRACKERS[config.tracker if state.ranks.is_first else "none"]
    return Tolerant(make(Path(config.out), dataclasses.asdict(config), state.step + 1))


@dataclass
class Trainer:
    """A run under way: steps, and what is due between them."""

    config: TrainConfig
    state: TrainState
    corpus: Corpus
    run: RunFolder
    log: MetricsLog
    progress: ProgressBar
    total: int
    """Steps of the whole run."""

    health: dict[str, Any] = field(default_factory=dict)
    """Of the router, as last logged."""
    skipped_in_a_row: int = 0
    warned: str | None = None

    def train(self) -> TrainResult:
        """Train to the end or an interruption, and save."""
        with (
            self.progress,
            interruptible(self._say_interrupted) as interrupted,
            preferred_kernels(self.state.ranks.device),
            closing(self.log.tracker),
        ):
            finished = self._steps(interrupted)
            path = self.save()
            if not finished:
                self.progress.note(
                    f"interrupted: saved after step {self.state.step}; continue with --resume"
                )
        # Freed after its process group, DDP can wait forever for gloo's threads.
        self.state.forward = self.state.model
        return TrainResult(path, self.state, self.corpus, finished)

    def _say_interrupted(self) -> None:
        self.progress.note("stopping after this step, with a checkpoint; Ctrl-C again stops now")

    def _steps(self, interrupted: Sequence[int]) -> bool:
        """Whether it reached the end."""
        config, state = self.config, self.state
        batches = self.corpus.train.batches(
            config.batch_size,
            config.seq_len,
            seed=config.seed,
            state=state.data,
            rank=state.ranks.rank,
            world_size=state.ranks.size,
            documents=config.data.document_mask,
        )
        while state.step < self.total:
            started = time.perf_counter()
            result = train_step(config, state, batches, self.total)
            elapsed_s = time.perf_counter() - started
            state.train_s += elapsed_s
            self._after_step(result, result.tokens * state.ranks.size / elapsed_s)
            if self._any_rank(interrupted):
                return state.step >= self.total
        return True

    def _any_rank(self, interrupted: Sequence[int]) -> bool:
        ranks = self.state.ranks
        return bool(ranks.max(torch.tensor(float(bool(interrupted)), device=ranks.device)))

    def _after_step(self, result: StepResult, tokens_per_s: float) -> None:
        config, step = self.config, self.state.step
        self._check_finite(result)
        if self._is_due(config.log_every):
            self.health = self._log(result, tokens_per_s)
        shown = health_text(self.health) if self.health else f"depth {result.mean_depth:.2f}"
        self.progress.update(step, f"loss {result.loss:.3f} · {tokens_per_s:,.0f} tok/s · {shown}")
        if self._is_due(config.eval_every):
            found = self._validate()
            if not self.progress.is_shown:
                self.progress.note(
                    f"{self.progress.label} {step}/{self.total} · loss {result.loss:.3f} · "
                    f"{found.bits_per_byte:.3f} bits/byte · {tokens_per_s:,.0f} tok/s · {shown}"
                )
        if config.save_every and self._is_due(config.save_every) and step < self.total:
            self.save()

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.total

    def _check_finite(self, result: StepResult) -> None:
        """Count and report a skipped step. Raises TrainingError after ``max_skipped`` in a row."""
        if result.is_finite:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        step, most = self.state.step, self.config.max_skipped
        what = f"its {'gradient' if math.isfinite(result.loss) else 'loss'} is not finite"
        self.progress.note(f"warning: step {step} is skipped: {what}")
        if self.skipped_in_a_row == most:
            kept = self.run.checkpoints()
            raise TrainingError(
                f"{most} steps in a row were skipped, the last at step {step}: {what}; "
                f"lower optim.lr (now {self.config.optim.lr:g}) or lengthen optim.warmup. "
                + (f"The last good checkpoint is {kept[-1]}" if kept else "No checkpoint was saved")
            )

    def _log(self, result: StepResult, tokens_per_s: float) -> dict[str, Any]:
        """Write the step's row; returns its router health."""
        state = self.state
        health = state.model.router.health(result.routings, state.ranks)
        if self.config.tracker != "none":
            self.log.tracker.histograms(state.step, routing_histograms(result.routings))
        self.log.write(
            step=state.step,
            flops=state.flops,
            tokens=state.tokens,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=learning_rate(self.config.optim, state.step - 1, self.total),
            skipped=state.skipped,
            tokens_per_s=tokens_per_s,
            **health,
            **result.aux_losses(state.ranks),
        )
        return health

    def _validate(self) -> Evaluation:
        """Causal loss on validation text, logged; warns of a router that has just collapsed."""
        config, state = self.config, self.state
        found = evaluate(
            state.model,
            self.corpus.validation,
            seq_len=config.seq_len,
            max_windows=config.eval_windows,
            document_mask=config.data.document_mask,
        )
        reshard(state.model)
        message = collapse_message(found.share_per_recursion)
        if message and message != self.warned:
            self.progress.note(f"warning: step {state.step}: {message}")
        self.warned = message
        self.log.write(
            step=state.step,
            flops=state.flops,
            tokens=state.tokens,
            validation_nll=found.nll,
            validation_bits_per_byte=found.bits_per_byte,
            validation_mean_depth=found.mean_depth,
            validation_share_per_recursion=found.share_per_recursion,
        )
        return found

    def save(self) -> Path:
        """Write the checkpoint of this step and delete those that are no longer kept."""
        state, path = self.state, self.run.checkpoint(self.state.step)
        try:
            sharded_state.save(
                path,
                state.model,
                self.corpus.tokenizer,
                state.optimizers,
                progress=state.progress | {"total_steps": self.total},
                ranks=state.ranks,
            )
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, by library
            kept = self.run.checkpoints()
            raise TrainingError(
                f"could not write {path}: {error}. "
                + (
                    f"The last good checkpoint is {kept[-1]}; "
                    if kept
                    else "There is no earlier checkpoint; "
                )
                + "make room and continue with --resume"
            ) from error
        if state.ranks.is_first:
            self.run.prune(self.config.keep, self.config.keep_steps)
        return path


def collapse_message(share_per_recursion: Sequence[float]) -> str | None:
    """Plain words if causal selection leaves a recursion without tokens."""
    empty = [r + 1 for r, share in enumerate(share_per_recursion) if share == 0]
    if not empty:
        return None
    return (
        f"no validation token takes recursion {', '.join(map(str, empty))}: the router collapsed. "
        "For token-choice raise router.balancing_weight; for expert-choice raise "
        "router.selection_weight or lower optim.lr"
    )
