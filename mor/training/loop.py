"""Training: one loop for every family, on one process or many.

text -> batches -> forward (top-k selection) -> LM loss + auxiliary losses -> step -> checkpoint
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn

from mor import checkpoint
from mor.data.stream import Batch, Corpus, DataState, load_corpus
from mor.device import preferred_kernels
from mor.evaluation.nll import evaluate
from mor.files import write_json
from mor.model.routing import Routing
from mor.model.transformer import Output, Transformer
from mor.training import distributed
from mor.training.config import TrainConfig, capacities_at, step_flops, total_steps
from mor.training.distributed import Ranks, reducing, reshard, spread, whole
from mor.training.metrics import MetricsLog, ProgressLine, health_text
from mor.training.optim import build_optimizers, learning_rate
from mor.training.trackers import TRACKERS, Tracker, routing_histograms


class TrainingError(ValueError):
    """A run that cannot go on; the message says why and what to do."""


@dataclass
class TrainState:
    """Everything that changes from step to step."""

    model: Transformer
    optimizers: list[torch.optim.Optimizer]
    ranks: Ranks
    forward: nn.Module
    """What a training step calls: the model, or what spreads it over the ranks."""
    step: int = 0
    data: DataState = field(default_factory=DataState)
    tokens: int = 0
    flops: float = 0.0
    train_s: float = 0.0
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""

    _COUNTERS = ("step", "tokens", "flops", "train_s", "skipped")

    @property
    def progress(self) -> dict[str, Any]:
        """Plain values that say where the run is. Nothing random is left to save: batches follow
        from the position."""
        return {name: getattr(self, name) for name in self._COUNTERS} | {
            "position": self.data.position
        }

    def load(self, path: Path) -> None:
        checkpoint.load_optimizers(path, self.model, self.optimizers, ranks=self.ranks)
        saved = checkpoint.load_progress(path)
        self.data = DataState(saved["position"])
        for name in self._COUNTERS:
            setattr(self, name, saved[name])


@dataclass(frozen=True)
class StepResult:
    """loss: language-model loss, nats per token. routings: one per forward of the step."""

    loss: float
    grad_norm: float
    routings: list[Routing]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def tokens(self) -> int:
        return sum(len(r.tokens) for r in self.routings)

    @property
    def mean_depth(self) -> float:
        return sum(sum(r.tokens_per_recursion()) for r in self.routings) / self.tokens

    def aux_losses(self, ranks: Ranks) -> dict[str, float]:
        """Means over the forwards of the step on all ranks, without their weights."""
        names = list(self.routings[0].losses)
        if not names:
            return {}
        values = torch.stack(
            [torch.stack([r.losses[n].value.detach() for n in names]) for r in self.routings]
        )
        return dict(zip(names, ranks.mean(values.mean(0)).tolist(), strict=True))


@dataclass(frozen=True)
class TrainResult:
    path: Path
    """The last checkpoint."""
    state: TrainState
    corpus: Corpus
    finished: bool


def compute_loss(output: Output) -> Tensor:
    """What training minimises: language-model loss plus the weighted auxiliary losses, means over
    tokens."""
    assert output.nll is not None
    return output.nll + output.routing.weighted_loss


def train_step(
    config: TrainConfig, state: TrainState, batches: Iterator[Any], total: int
) -> StepResult:
    """One optimizer step over ``config.accumulate`` batches; weights stay as they are if it is not
    finite."""
    model, device = state.model, state.ranks.device
    capacities, routings, losses = capacities_at(config, state.step), [], []
    for i in range(config.accumulate):
        batch, state.data = next(batches)
        with reducing(state.forward, last=i == config.accumulate - 1):
            with _autocast(config, device):
                output = _forward(config, state.forward, batch, capacities, device)
                loss = compute_loss(output)
            (loss / config.accumulate).backward()
        assert output.nll is not None
        losses.append(output.nll.detach())
        routings.append(output.routing)
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip))
    result = StepResult(
        state.ranks.mean(torch.stack(losses).mean()).item(), grad_norm.item(), routings
    )
    if result.is_finite:
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optim, state.step, total)
            optimizer.step()
        model.router.after_step(routings)
    else:
        state.skipped += 1
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += config.batch_size * config.accumulate * config.seq_len * state.ranks.size
    state.flops += step_flops(config, state.step - 1, state.ranks.size)
    return result


def _forward(
    config: TrainConfig,
    forward: nn.Module,
    batch: Batch,
    capacities: Sequence[float],
    device: torch.device,
) -> Output:
    return forward(
        batch.tokens_BT.to(device),
        targets_BT=batch.targets_BT.to(device),
        documents_BT=None if batch.documents_BT is None else batch.documents_BT.to(device),
        selection="topk",
        capacities=capacities,
        recompute=config.recompute,
    )


def _autocast(config: TrainConfig, device: torch.device) -> Any:
    on = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if on else nullcontext()


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
    none yet. Ctrl-C or SIGTERM finishes the step, saves and returns with ``finished=False``. Raises
    TrainingError if the loss stays not finite or a checkpoint cannot be written, ValueError if the
    newest one is damaged or another process trains in ``config.out``.
    """
    with distributed.ranks(config.device) as ranks, alone_in(Path(config.out), ranks):
        shown = (console or Console()) if ranks.is_first else Console(quiet=True)
        return _train(config, ranks, resume, corpus, shown, label)


@contextmanager
def alone_in(out: Path, ranks: Ranks) -> Iterator[None]:
    """A lock on the run directory, which goes with the process however that ends. Who holds it may
    take it again.

    Raises ValueError if another process holds it.
    """
    lock, taken = FileLock(out / ".lock", blocking=False, is_singleton=True), False
    if ranks.is_first:
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            taken = True
    if ranks.from_first(taken):
        raise ValueError(
            f"another process is training in {out}; wait for its end, or choose another --out"
        )
    try:
        yield
    finally:
        # nothing was begun
        if ranks.is_first and [file.name for file in out.iterdir()] == [".lock"]:
            shutil.rmtree(out)  # before the lock is free, so that it is nobody else's folder
        lock.release()


def _train(
    config: TrainConfig,
    ranks: Ranks,
    resume: bool,
    corpus: Corpus | None,
    console: Console,
    label: str,
) -> TrainResult:
    out = Path(config.out)
    if ranks.from_first(not resume and (out / "metrics.jsonl").exists()):
        raise ValueError(
            f"{out} already holds a run; resume it with --resume, choose another --out, or delete "
            "it"
        )
    start = ranks.from_first(_start(config, resume, console) if ranks.is_first else None)
    saved = checkpoint.load(start) if start else None
    corpus = corpus or load_corpus(config.data, saved.tokenizer if saved else None)
    config = dataclasses.replace(
        config, model=config.model.replace(vocab_size=corpus.tokenizer.vocab_size)
    )
    model = saved.model.train() if saved else Transformer(config.model).init_weights(config.seed)
    if saved is None and model.router.needs_token_counts:
        model.router.fit(corpus.train.token_counts(config.model.vocab_size, config.seq_len))
    model.to(ranks.device)
    if config.compile == "on" or (config.compile == "auto" and ranks.device.type == "cuda"):
        model.compile_blocks()
    forward = spread(model, ranks, config.parallel)
    state = TrainState(model, build_optimizers(model, config.optim), ranks, forward)
    if start:
        state.load(start)
    tracker = _tracker(config, state)
    log = MetricsLog(
        out / "metrics.jsonl",
        truncate_to=state.step if resume else None,
        active=ranks.is_first,
        tracker=tracker,
    )
    if ranks.is_first:
        write_json(out / "train.json", dataclasses.asdict(config))
    total = total_steps(config, ranks.size)
    with (
        ProgressLine(console, total, state.step, label) as progress,
        _interruptible() as interrupted,
        preferred_kernels(ranks.device),
        closing(tracker),
    ):
        finished = _loop(config, state, corpus, total, log, progress, interrupted)
    path = _save(config, state, corpus, total)
    # freed after its process group, DistributedDataParallel can wait for ever for gloo's threads
    state.forward = model
    return TrainResult(path, state, corpus, finished)


def _tracker(config: TrainConfig, state: TrainState) -> Tracker:
    make = TRACKERS[config.tracker if state.ranks.is_first else "none"]
    return make(Path(config.out), dataclasses.asdict(config), state.step + 1)


def _start(config: TrainConfig, resume: bool, console: Console) -> Path | None:
    """The checkpoint that a run begins with; None for fresh weights."""
    checkpoint.tidy(Path(config.out) / "checkpoints")
    if resume:
        if newest := checkpoint.newest_intact(Path(config.out)):
            return newest
        console.print(
            f"{config.out} has no checkpoint yet: starting at its beginning", highlight=False
        )
    if config.branch_from is None:
        return None
    start = checkpoint.resolve(config.branch_from)
    checkpoint.verify(start)
    return start


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
    batches = corpus.train.batches(
        config.batch_size,
        config.seq_len,
        seed=config.seed,
        state=state.data,
        rank=state.ranks.rank,
        world_size=state.ranks.size,
        documents=config.data.document_mask,
    )
    warned: str | None = None
    health: dict[str, Any] = {}  # as last logged
    skipped_in_a_row = 0
    while state.step < total:
        started = time.perf_counter()
        result = train_step(config, state, batches, total)
        elapsed_s = time.perf_counter() - started
        state.train_s += elapsed_s
        skipped_in_a_row = 0 if result.is_finite else skipped_in_a_row + 1
        if skipped_in_a_row:
            progress.note(f"warning: step {state.step} is skipped: {_not_finite(result)}")
        if skipped_in_a_row == config.max_skipped:
            raise TrainingError(_stop_message(config, state, result))
        if state.step % config.log_every == 0 or state.step == total:
            health = _log_step(config, state, result, elapsed_s, total, log)
        rate = result.tokens * state.ranks.size / elapsed_s
        shown = health_text(health) if health else f"depth {result.mean_depth:.2f}"
        progress.update(state.step, f"loss {result.loss:.3f} · {rate:,.0f} tok/s · {shown}")
        if state.step % config.eval_every == 0 or state.step == total:
            found = evaluate(
                state.model,
                corpus.validation,
                seq_len=config.seq_len,
                max_windows=config.eval_windows,
                document_mask=config.data.document_mask,
            )
            reshard(state.model)
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
                    f"{found.bits_per_byte:.3f} bits/byte · {rate:,.0f} tok/s · {shown}"
                )
        if config.save_every and state.step % config.save_every == 0 and state.step < total:
            _save(config, state, corpus, total)
        if state.ranks.max(torch.tensor(float(bool(interrupted)), device=state.ranks.device)):
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
        "For token-choice raise router.balancing_weight; for expert-choice raise "
        "router.selection_weight "
        "or lower optim.lr"
    )


def _not_finite(result: StepResult) -> str:
    return f"its {'gradient' if math.isfinite(result.loss) else 'loss'} is not finite"


def _stop_message(config: TrainConfig, state: TrainState, result: StepResult) -> str:
    kept = sorted(Path(config.out).glob("checkpoints/step-*"))
    return (
        f"{config.max_skipped} steps in a row were skipped, the last at step {state.step}: "
        f"{_not_finite(result)}; "
        f"lower optim.lr (now {config.optim.lr:g}) or lengthen optim.warmup. "
        + (f"The last good checkpoint is {kept[-1]}" if kept else "No checkpoint was saved before")
    )


def _log_step(
    config: TrainConfig,
    state: TrainState,
    result: StepResult,
    elapsed_s: float,
    total: int,
    log: MetricsLog,
) -> dict[str, Any]:
    """Write the step's row; returns its router health."""
    health = state.model.router.health(result.routings, state.ranks)
    log.tracker.histograms(
        state.step, routing_histograms(result.routings) if config.tracker != "none" else {}
    )
    log.write(
        step=state.step,
        flops=state.flops,
        tokens=state.tokens,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=learning_rate(config.optim, state.step - 1, total),
        skipped=state.skipped,
        tokens_per_s=result.tokens * state.ranks.size / elapsed_s,
        **health,
        **result.aux_losses(state.ranks),
    )
    return health


def _save(config: TrainConfig, state: TrainState, corpus: Corpus, total: int) -> Path:
    folder = Path(config.out) / "checkpoints"
    path = folder / f"step-{state.step:08d}"
    # what a full disk looks like, by library
    try:
        checkpoint.save(
            path,
            state.model,
            corpus.tokenizer,
            progress=state.progress | {"total_steps": total},
            optimizers=state.optimizers,
            ranks=state.ranks,
        )
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:
        kept = sorted(folder.glob("step-*"))
        raise TrainingError(
            f"could not write {path}: {error}. "
            + (
                f"The last good checkpoint is {kept[-1]}; "
                if kept
                else "There is no earlier checkpoint; "
            )
            + "make room and continue with --resume"
        ) from error
    if config.keep and state.ranks.is_first:
        spared = {f"step-{step:08d}" for step in config.keep_steps}
        for old in [path for path in sorted(folder.glob("step-*")) if path.name not in spared][
            : -config.keep
        ]:
            checkpoint.remove(old)
    return path


@contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """A list that the first Ctrl-C or SIGTERM fills; the next one ends the process as usual."""
    asked: list[bool] = []
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }

    def handle(number: int, _: object) -> None:
        asked.append(True)
        signal.signal(number, usual[number])

    try:
        before = {number: signal.signal(number, handle) for number in usual}
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
