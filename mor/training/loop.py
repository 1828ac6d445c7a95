"""Training: one loop for every family, on one process or many.

text -> batches -> steps -> metrics, validation, checkpoints in the run's folder
"""

from __future__ import annotations

import dataclasses
import errno
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal as in_bytes
from safetensors import SafetensorError

from mor import checkpoint
from mor.data.corpus import Corpus, load_corpus
from mor.data.stream import Fingerprint
from mor.device import peak_flops_per_s
from mor.evaluation.calibrate import FITTED_TOKENS, LEAST_TOKENS, calibrate, num_forwards
from mor.evaluation.finite import NotFiniteError
from mor.evaluation.nll import Evaluation, evaluate
from mor.files import naming, remove_folder, write_json
from mor.interruption import interruptible
from mor.model.budget import has_depths
from mor.model.transformer import Transformer
from mor.progress import ProgressBar
from mor.run_folder import RunFolder
from mor.training import distributed, sharded_state
from mor.training.collapse import CollapseWatch
from mor.training.compiling import compile_layers
from mor.training.config import TrainConfig, step_flops, total_steps
from mor.training.distributed import Ranks, own_share, reshard, spread
from mor.training.log import MetricsLog, Speed, health_text
from mor.training.optim import build_optimizers, freeze, learning_rate
from mor.training.resume import Saved, branched, can_branch, continued, record
from mor.training.source_cache import SourceCache
from mor.training.step import StepResult, TrainState, train_step
from mor.training.tracing import tracing
from mor.training.trackers import TRACKERS, Tolerant, Tracker, routing_histograms
from mor.training.validation import check_validation

SAVING_SHARE = 1 / 20
"""Largest share of the time that goes into checkpoints by the clock."""


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
    announce: Callable[[TrainConfig, int], str] | None = None,
) -> TrainResult:
    """Train a model as configured and save it under ``config.out``.

    resume: continue the run in ``config.out`` from its newest checkpoint, or start it if there is
    none yet; a longer ``steps`` or ``flops`` lengthens it (see :mod:`mor.training.resume`).
    announce: a line about the run, of its settings and number of processes, which is printed once
    all of that is known to fit. Ctrl-C
    or SIGTERM finishes the step, saves and returns with ``finished=False``; a second one raises
    KeyboardInterrupt. Raises TrainingError if loss or weights are not finite or the last checkpoint
    cannot be written; ValueError if the newest one is damaged or of another run, or another process
    trains in ``config.out``.
    """
    run = RunFolder(Path(config.out))
    with distributed.ranks(config.device, config.precision) as ranks, _alone_in(run, ranks):
        shown = (console or Console()) if ranks.is_first else Console(quiet=True)
        trainer = _prepare(config, run, ranks, resume, corpus, shown, label, announce)
        return trainer.train()


@contextmanager
def _alone_in(run: RunFolder, ranks: Ranks) -> Iterator[None]:
    """The first rank holds the run's lock for all; if it cannot, every rank raises its error."""

    def hold(stack: ExitStack) -> None:
        try:
            stack.enter_context(run.lock())
        except OSError as error:
            raise ValueError(f"{run.path} cannot be written: {error.strerror}") from error

    with ExitStack() as stack:
        ranks.first_does(lambda: hold(stack))
        yield


def _prepare(
    config: TrainConfig,
    run: RunFolder,
    ranks: Ranks,
    resume: bool,
    corpus: Corpus | None,
    console: Console,
    label: str,
    announce: Callable[[TrainConfig, int], str] | None,
) -> Trainer:
    """Everything that a run needs, to start or to continue where it was interrupted.

    All that can fail comes first. Only then is the run written to its folder, which a start that
    fails leaves free.
    """
    found = _beginning(config, run, ranks, resume, corpus, console)
    config, saved = found.config, found.saved
    total = total_steps(config, ranks.size)
    if ranks.size > 1 and (config.source_cache or config.model.router.kind == "gain"):
        raise ValueError(
            "source_cache and router.kind='gain' are for one process; leave torchrun out"
        )
    ranks.first_does(lambda: _check_room(config, run, console))
    model = (
        found.model.train() if found.model else Transformer(config.model).init_weights(config.seed)
    )
    if saved is None and model.router.needs_token_counts:
        counts = found.corpus.train.token_counts(config.model.vocab_size, config.seq_len)
        model.router.fit(counts)
    freeze(model, config.trained)
    state = _on_ranks(config, model.to(ranks.device), ranks)
    if saved:
        state.load(saved.folder)
    if config.source_cache:
        state.source = SourceCache(
            Path(config.source_cache), state.model, config.seq_len, config.precision
        )
    tracker = _tracker(config, state)
    progress = ProgressBar(console, label, total=total, done=state.step, counted=True)
    kept = state.step if found.is_own else 0
    log = MetricsLog(run, step=kept, active=ranks.is_first, tracker=tracker)
    earlier = saved.schedules if saved and found.is_own else []
    facts = record(found.chosen, found.data, ranks.size, earlier, config.optim)
    kept_lines = [cache_line(state.source, config, total - state.step)] if state.source else []
    for line in [
        *([announce(config, ranks.size)] if announce else []),
        *found.notes,
        *kept_lines,
    ]:
        progress.note(line)
    watch = CollapseWatch(config.model.router)
    trainer = Trainer(config, state, found.corpus, run, log, progress, total, facts, watch)
    trainer.skipped_in_a_row = saved.skipped_in_a_row if saved and found.is_own else 0
    if saved and found.is_own and saved.total_steps == total:
        trainer.saved_step = state.step
        if ranks.is_first:
            trainer.tidy_checkpoints()
    elif found.is_own:
        trainer.save()  # under its new length, so that a crash does not forget it
    if ranks.is_first:
        write_json(run.settings, dataclasses.asdict(found.chosen))
    return trainer


@dataclass(frozen=True)
class _Beginning:
    """Where a run starts from: fresh weights, the weights of a model (without saved), or a
    checkpoint of it (own) or of another run.

    config: with the schedule in force. chosen: with the one that was asked for; they differ where a
    run was lengthened. notes: what is other than it was.
    """

    config: TrainConfig
    chosen: TrainConfig
    corpus: Corpus
    data: Fingerprint
    saved: Saved | None
    model: Transformer | None
    is_own: bool
    notes: Sequence[str] = ()


def _beginning(
    config: TrainConfig,
    run: RunFolder,
    ranks: Ranks,
    resume: bool,
    corpus: Corpus | None,
    console: Console,
) -> _Beginning:
    """Settings, data and checkpoint, which fit each other."""
    start = ranks.first_does(lambda: _start(config, run, resume, console))
    source = start or (checkpoint.resolve(config.init_from) if config.init_from else None)
    loaded = checkpoint.load(source) if source else None
    corpus = corpus or load_corpus(config.data, loaded.tokenizer if loaded else None)
    if loaded and config.init_from:
        config = config.with_model_of(loaded.config)
        with naming(str(source)):
            corpus.tokenizer.check_fits(config.model.vocab_size)
    else:
        model = config.model.replace(vocab_size=corpus.tokenizer.vocab_size)
        config = dataclasses.replace(config, model=model)
    _check_length(corpus, config)
    data = corpus.fingerprint()
    if start is None or loaded is None:
        made = loaded.model if loaded else None
        return _Beginning(config, config, corpus, data, None, made, is_own=False)
    saved, is_own = Saved.of(start), start in run.checkpoints()
    if not is_own:  # the path itself: what is newest in another run may change
        config = dataclasses.replace(config, branch_from=str(start))
    fit = continued if is_own else branched
    found, notes = fit(config, saved, loaded.config, data, ranks.size)
    return _Beginning(found, config, corpus, data, saved, loaded.model, is_own, notes)


def _start(config: TrainConfig, run: RunFolder, resume: bool, console: Console) -> Path | None:
    """The checkpoint that a run begins with; None for fresh weights."""
    run.tidy()
    if run.is_begun and not resume:
        raise ValueError(
            f"{run.path} already holds a run; resume it with --resume, choose another --out, or "
            "delete it"
        )
    if newest := run.newest_intact(checkpoint.check_to_continue):
        return newest
    if resume or run.metrics.exists():
        console.print(
            f"{run.path} has no checkpoint yet: starting at its beginning", highlight=False
        )
    if config.branch_from is None:
        return None
    start = checkpoint.resolve(config.branch_from)
    checkpoint.check_to_continue(start)
    return start


def _check_length(corpus: Corpus, config: TrainConfig) -> None:
    """Raise ValueError if a split holds too little to begin with."""
    with naming("the training text is too short"):
        corpus.train.spread(config.seq_len, 1)
    with naming("the validation text is too short"):
        check_validation(corpus.validation, config.seq_len)


def _check_room(config: TrainConfig, run: RunFolder, console: Console) -> None:
    """Raise ValueError if no checkpoint fits on the disk; say so if not all that are kept do."""
    size = checkpoint_bytes(config)
    free = shutil.disk_usage(run.path).free
    held = len(run.checkpoints())
    wanted = config.keep + 1  # a new one is complete before the oldest goes
    if free < size:
        raise ValueError(
            f"the disk of {run.path} has {in_bytes(free)} free, a checkpoint takes about "
            f"{in_bytes(size)}; make room or choose another --out"
        )
    if free < size * (wanted - held):
        console.print(
            f"warning: the disk of {run.path} has {in_bytes(free)} free; up to {wanted} "
            f"checkpoints of about {in_bytes(size)} each are held at a time: lower --keep or make "
            "room",
            highlight=False,
            soft_wrap=True,
        )


def cache_line(cache: SourceCache, config: TrainConfig, steps: int) -> str:
    """What is there, and what the run may add to it."""
    tokens = steps * config.batch_size * config.accumulate * config.seq_len
    return (
        f"{config.source_cache}: {in_bytes(cache.nbytes)} of the source's states and losses, at "
        f"most {in_bytes(round(tokens * cache.bytes_per_token))} more in this run "
        f"({cache.bytes_per_token:,.0f} bytes per token)"
    )


def checkpoint_bytes(config: TrainConfig) -> int:
    """Of a checkpoint of training, about: weights, and two moments of those that are trained, in
    float32."""
    with torch.device("meta"):
        model = Transformer(config.model)
    freeze(model, config.trained)
    return 4 * sum(p.numel() * (3 if p.requires_grad else 1) for p in model.parameters())


def _on_ranks(config: TrainConfig, model: Transformer, ranks: Ranks) -> TrainState:
    if config.compile == "on" or (config.compile == "auto" and ranks.device.type == "cuda"):
        compile_layers(model, config.precision, needed=config.compile == "on")
    forward = spread(model, ranks, config.parallel, config.precision)
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
    facts: dict[str, Any]
    """Of the run, for its checkpoints: see :func:`mor.training.resume.record`."""
    collapse: CollapseWatch

    saved_step: int | None = None
    """Of the newest checkpoint; None if there is none of this run."""
    evaluated_step: int | None = None
    """At which loss and weights were last found finite."""
    next_save: float = math.inf
    """When the clock asks for a checkpoint, by time.monotonic."""
    health: dict[str, Any] = field(default_factory=dict)
    """Of the router, as last logged."""
    numbers: str = ""
    """Of the last step, for messages."""
    skipped_in_a_row: int = 0
    cannot_link: bool = False
    passing: Path | None = None
    """The newest checkpoint, if only the clock asked for it."""

    def train(self) -> TrainResult:
        """Train to the end or an interruption, and save."""
        if self.saved_step == self.total:
            self.progress.note(
                f"{self.run.path} is finished: it has taken all of its {self.total} steps. To "
                "train it longer, give a larger number: --resume --steps N"
            )
        self.next_save = time.monotonic() + 60 * (self.config.save_minutes or math.inf)
        with (
            self.progress,
            interruptible(self._say_interrupted) as interrupted,
            closing(self.log.tracker),
        ):
            finished = self._steps(interrupted)
            if self.saved_step != self.state.step:
                self.save()
            path = self.run.checkpoint(self.state.step)
            if finished:
                self._calibrate(path)
            else:
                self.progress.note(
                    f"interrupted: saved after step {self.state.step}; continue with --resume"
                )
        # Freed after its process group, DDP can wait forever for gloo's threads.
        self.state.forward = self.state.model
        return TrainResult(path, self.state, self.corpus, finished)

    def _calibrate(self, path: Path) -> None:
        """Give the last checkpoint its table of depths, where that is a small part of the run."""
        config, state = self.config, self.state
        learns = state.model.router.is_learned and has_depths(state.model.config)
        if not (config.calibrate and learns) or checkpoint.read_depth_table(path):
            return
        tokens = int(state.tokens / (10 * num_forwards(state.model.config)))
        if why := self._why_no_table(tokens):
            self.progress.note(f"no table of depths, as {why}; mor calibrate makes one for --depth")
            return
        table = calibrate(
            state.model,
            self.corpus.validation,
            seq_len=config.seq_len,
            max_windows=max(1, min(tokens, FITTED_TOKENS) // config.seq_len),
            document_mask=config.data.document_mask,
        )
        checkpoint.write_depth_table(path, table)

    def _why_no_table(self, tokens: int) -> str:
        """Why calibration is left out; empty if it is not. tokens: that it may read."""
        if self.state.ranks.size > 1:
            return "the run has several processes"
        if tokens < LEAST_TOKENS:
            return "the run is short"
        if self.corpus.validation.num_windows(self.config.seq_len) < 2:
            return "the validation text is short"
        return ""

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
        traced_steps = config.profile if state.ranks.is_first else 0
        with tracing(traced_steps, self.run.trace, self.progress.note) as traced:
            while state.step < self.total:
                started = time.perf_counter()
                result = train_step(config, state, batches, self.total)
                elapsed_s = time.perf_counter() - started
                state.train_s += elapsed_s
                self._after_step(result, self._speed(result, elapsed_s))
                traced()
                # Not between skipped steps: what they fail of may be these weights.
                may_save = self.saved_step != state.step and not self.skipped_in_a_row
                is_late = may_save and time.monotonic() >= self.next_save
                stop, late = state.ranks.any(bool(interrupted), is_late)
                if stop:
                    return state.step >= self.total
                if late and state.step < self.total:
                    self.save(by_clock=True)
        return True

    def _speed(self, result: StepResult, elapsed_s: float) -> Speed:
        ranks = self.state.ranks
        flops = step_flops(self.config, self.state.step - 1, ranks.size)
        peak = peak_flops_per_s(ranks.device)
        return Speed.of(result.tokens * ranks.size, flops, elapsed_s, ranks.size, peak)

    def _after_step(self, result: StepResult, speed: Speed) -> None:
        """What is due now, but for what the clock asks."""
        config, step = self.config, self.state.step
        self.numbers = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}, "
        self._check_finite(result)
        if self._is_due(config.log_every):
            self.health = self._log(result, speed)
        shown = health_text(self.health) if self.health else f"depth {result.mean_depth:.2f}"
        self.progress.update(step, f"loss {result.loss:.3f} · {speed.in_words} · {shown}")
        if self._is_due(config.eval_every):
            found = self._validate()
            if not self.progress.is_shown:
                self.progress.note(
                    f"{self.progress.label} {step}/{self.total} · loss {result.loss:.3f} · "
                    f"{found.score.in_words} · {speed.in_words} · {shown}"
                )
        if step == self.total:
            return  # saved after the last step in any case
        if step in config.keep_steps:
            self.save()
        elif self.skipped_in_a_row:
            return  # the weights may be what the steps fail of: those before are the better ones
        elif config.save_every and self._is_due(config.save_every):
            self.save()

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.total

    def _check_finite(self, result: StepResult) -> None:
        """Count and report a skipped step. Raises TrainingError after ``max_skipped`` in a row, and
        at once if no later step can be better."""
        if result.is_finite:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        step, most = self.state.step, max(1, self.config.max_skipped)
        what = f"its {'gradient' if math.isfinite(result.loss) else 'loss'} is not finite"
        self.progress.note(f"warning: step {step} is skipped: {what}")
        if not self._weights_are_finite():
            raise self._not_finite("its weights are not finite")
        if self.skipped_in_a_row >= most:
            in_a_row = f", and {most} steps in a row were skipped" if most > 1 else ""
            raise self._not_finite(f"{what}{in_a_row}")

    def _weights_are_finite(self) -> bool:
        shares = map(own_share, self.state.model.parameters())
        finite = torch.stack([share.isfinite().all() for share in shares]).all()
        (broken,) = self.state.ranks.any(not bool(finite))
        return not broken

    def _not_finite(self, what: str) -> TrainingError:
        step, optim = self.state.step, self.config.optim
        rate = learning_rate(optim, step - 1, self.total)
        good, where = self._last_good(), "in a new run"
        if good and can_branch(good):
            where += f", or from that one on with --branch-from {good} --steps N --optim.lr X "
            where += "--out FOLDER"
        return TrainingError(
            f"step {step}: {what} ({self.numbers}learning rate {rate:g}). {_called_good(good)}. "
            f"Lower optim.lr (now {optim.lr:g}) or lengthen optim.warmup {where}"
        )

    def _last_good(self) -> Path | None:
        """The newest checkpoint that was not written between skipped steps; for a branch without
        one, where it began."""
        for path in reversed(self.run.checkpoints()):
            with suppress(ValueError):  # a damaged one is no good one
                if not Saved.of(path).skipped_in_a_row:
                    return path
        return Path(self.config.branch_from) if self.config.branch_from else None

    def _log(self, result: StepResult, speed: Speed) -> dict[str, Any]:
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
            **speed.known,
            **health,
            **result.aux_losses(state.ranks),
        )
        return health

    def _evaluate(self, max_windows: int) -> Evaluation:
        """Causal loss on validation text. Raises TrainingError if it or a weight is not finite."""
        config, state = self.config, self.state
        if not self._weights_are_finite():
            raise self._not_finite("its weights are not finite")
        try:
            found = evaluate(
                state.model,
                self.corpus.validation,
                seq_len=config.seq_len,
                max_windows=max_windows,
                document_mask=config.data.document_mask,
                precision=config.precision,
            )
        except NotFiniteError as error:
            raise self._not_finite("the loss on validation text is not finite") from error
        reshard(state.model)
        self.evaluated_step = state.step
        return found

    def _validate(self) -> Evaluation:
        """Evaluate and log; warns of recursions that no token takes."""
        state, found = self.state, self._evaluate(self.config.eval_windows)
        last = state.step == self.total
        for message in self.collapse.messages(found.share_per_recursion, self.health, last=last):
            self.progress.note(f"warning: step {state.step}: {message}")
        self.log.write(
            step=state.step,
            flops=state.flops,
            tokens=state.tokens,
            validation_nll=found.nll,
            validation_bits_per_byte=found.bits_per_byte,
            validation_tokens=found.score.tokens,
            validation_bytes=found.score.bytes,
            validation_mean_depth=found.mean_depth,
            validation_share_per_recursion=found.share_per_recursion,
        )
        return found

    def save(self, *, by_clock: bool = False) -> None:
        """Write the checkpoint of this step and delete those that are no longer kept. Raises
        TrainingError, and writes nothing, if the weights are not worth keeping."""
        state, path, started = self.state, self.run.checkpoint(self.state.step), time.monotonic()
        if self.evaluated_step != state.step:
            self._evaluate(max_windows=1)
        try:
            sharded_state.save(
                path,
                state.model,
                self.corpus.tokenizer,
                state.optimizers,
                progress=state.progress | self.facts | {"skipped_in_a_row": self.skipped_in_a_row},
                ranks=state.ranks,
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # by library
            good = self._last_good()
            raise TrainingError(
                f"could not write {path}: {why_not_written(error, self.config, path)}. "
                f"{_called_good(good)}; mend that and continue with --resume"
            ) from error
        self.saved_step = state.step
        if state.ranks.is_first:
            self.tidy_checkpoints(path if by_clock else None)
        took = time.monotonic() - started
        wait = max(60 * self.config.save_minutes, took / SAVING_SHARE)
        self.next_save = time.monotonic() + (wait if self.config.save_minutes else math.inf)

    def tidy_checkpoints(self, passing: Path | None = None) -> None:
        """Point to the newest one, then delete those that are no longer kept. passing: the newest,
        if only the clock asked for it."""
        config = self.config
        try:
            self.run.link_newest()
        except OSError as error:
            if not self.cannot_link:
                self.progress.note(
                    f"{self.run.path} cannot hold links ({error.strerror}): for from_pretrained "
                    f"give the checkpoint's folder, such as {self.run.checkpoint(self.state.step)}"
                )
            self.cannot_link = True
        if self.skipped_in_a_row:
            return  # those before are the better ones
        self.run.prune(config.keep, config.keep_steps)
        if not config.keep and self.passing:
            remove_folder(self.passing)
        self.passing = passing


def _called_good(good: Path | None) -> str:
    return f"The last good checkpoint is {good}" if good else "No checkpoint was saved"


def why_not_written(error: Exception, config: TrainConfig, path: Path) -> str:
    """In plain words: the libraries that write say only where in their code they stopped."""
    if isinstance(error, ValueError):
        return str(error)
    number, words = getattr(error, "errno", None), getattr(error, "strerror", None)
    if words and number not in (errno.EFBIG, errno.ENOSPC):
        return str(error)
    size, free = checkpoint_bytes(config), shutil.disk_usage(path.parent.parent).free
    most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if most != resource.RLIM_INFINITY and most < size:
        return (
            f"a file may have at most {in_bytes(most)} here (ulimit -f), the files of a checkpoint "
            f"have about {in_bytes(size)} together"
        )
    if free < size:
        return f"the disk has {in_bytes(free)} free, a checkpoint takes about {in_bytes(size)}"
    return words or f"not all of a file was written; is the disk full or its quota? ({error})"
