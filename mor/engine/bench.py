"""How fast an engine decodes in a steady state: it always has as many requests as slots.

Engines take turns in one process, so that other work on the machine disturbs all alike. What counts
is ratios of medians.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any

import torch
from pydantic import Field

from mor.costs import flops as costs
from mor.engine.engine import Batching, Engine, EngineConfig
from mor.files import naming
from mor.generation import SamplingParams
from mor.model.budget import Depth, budget_of, corners, shares_of, table_of
from mor.model.transformer import Transformer
from mor.settings import NonNegativeFloat, Settings

LAYERS = ("enter", "block", "coda", "token", "read")
"""Parts of ``Engine.measured`` that are spent in layers and routers."""


def measure_machine(device: torch.device, dtype: torch.dtype, *, repeats: int = 7) -> costs.Machine:
    """The device's speed in large matrix products and in reading memory, medians."""
    rows, inner, numbers = machine_sizes(device)
    a = torch.randn(rows, inner, device=device).to(dtype)
    memory = torch.zeros(numbers, device=device)
    out, flops = torch.empty_like(a @ a.T), 2 * rows * rows * inner
    product_s = median(_timed(lambda: torch.mm(a, a.T, out=out), device) for _ in range(repeats))
    reading_s = median(_timed(memory.sum, device) for _ in range(repeats))
    return costs.Machine(flops_per_s=flops / product_s, bytes_per_s=memory.nbytes / reading_s)


def machine_sizes(device: torch.device) -> tuple[int, int, int]:
    """Rows and columns of a factor, and how many numbers are read: a millisecond's work or more, so
    that beginning it does not count."""
    return (8192, 8192, 1 << 30) if device.type == "cuda" else (1024, 2048, 1 << 26)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds; on CUDA by the device's own clock, without the time that a launch takes."""
    if device.type == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        work()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Lengths(Settings):
    """New tokens of a request: normally distributed, from 2 to twice the mean."""

    mean: Annotated[float, Field(ge=1)] = 64
    deviation: NonNegativeFloat = 16

    @property
    def longest(self) -> int:
        return int(2 * self.mean)

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        drawn = torch.randn(count, generator=generator) * self.deviation + self.mean
        return drawn.round().clamp(2, self.longest).long().tolist()


@dataclass
class SteadyLoad:
    """An engine that is always full. It starts as if it had been running for long, with requests at
    every stage of their lives. Each turn adds a number to each of the lists."""

    name: str
    engine: Engine
    lengths: Lengths
    prompt: int = 1
    """Tokens in the prompt of a new request."""
    seed: int = 0
    tokens_per_s: list[float] = field(default_factory=list)
    layers_s: list[float] = field(default_factory=list)
    """Seconds in layers per new token; 0 in the device loop, which does not time its parts."""
    host_s: list[float] = field(default_factory=list)
    """Seconds per step outside layers, routers, head and sampling, such as scheduling. On CUDA,
    outside the launches of the device loop, each of which waits for its tokens; with the loop on
    the host, launching layers counts as layers."""
    step_s: list[float] = field(default_factory=list)
    depths: Counter[int] = field(default_factory=Counter)
    """New tokens by the recursions that they came from."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        engine = self.engine
        for length in self.lengths.draw(engine.config.max_num_seqs, self.generator):
            done = int(torch.randint(0, length - 1, (), generator=self.generator))
            self._add(1 + done, length - done)
        while any(r.num_read < len(r.prompt_ids) - 1 for r in engine.requests.values()):
            self._step()

    def turn(self, seconds: float) -> None:
        """Run for about so long, and longer if no token has come out by then."""
        engine, device = self.engine, self.engine.kv.device
        measured = engine.measured
        measured.clear()
        engine.runner.model_s = 0.0
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds or not measured.tokens["sample"]:
            self._step()
            steps += 1
        wait(device)
        elapsed, new = time.perf_counter() - start, measured.tokens["sample"]
        self.tokens_per_s.append(new / elapsed)
        self.layers_s.append(sum(measured.seconds[part] for part in LAYERS) / new)
        self.host_s.append((elapsed - self._away_s()) / steps)
        self.step_s.append(elapsed / steps)

    def shares(self) -> list[float]:
        """The share of new tokens that took each recursion."""
        new, deepest = self.depths.total(), max(self.depths)
        return [sum(self.depths[d] for d in self.depths if d > r) / new for r in range(deepest)]

    def _away_s(self) -> float:
        """Seconds of a turn in the model."""
        seconds = self.engine.measured.seconds
        if self.engine.kv.device.type == "cuda" and seconds["launch"]:
            return seconds["launch"]  # a graph's replay knows no parts
        return self.engine.runner.model_s + seconds["sample"]

    def _step(self) -> None:
        for output in self.engine.step():
            if output.request.error:
                raise ValueError(f"{self.name}: {output.request.error}")
            if output.source_depth is not None:
                self.depths[output.source_depth] += 1
            if output.finish_reason:
                self._add(self.prompt, self.lengths.draw(1, self.generator)[0])

    def _add(self, prompt: int, new: int) -> None:
        vocab_size = self.engine.runner.model.config.vocab_size
        ids = torch.randint(0, vocab_size, (prompt,), generator=self.generator).tolist()
        self.engine.add_request(ids, SamplingParams(max_new_tokens=new, temperature=0))


def take_turns(loads: Sequence[SteadyLoad], *, rounds: int, seconds: float) -> None:
    """``rounds`` turns of each load, after a short one that does not count."""
    for load in loads:
        load.turn(seconds / 4)
        for found in (load.tokens_per_s, load.layers_s, load.host_s, load.step_s, load.depths):
            found.clear()
    for _ in range(rounds):
        for load in loads:
            load.turn(seconds)


@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """One model at one batch size against the baseline."""

    model: str
    batch: int
    """Most tokens in a pass of the shared layers."""
    slots: int
    """Requests that run at a time."""
    tokens_per_s: float
    speedup: float
    """Ratio of median tokens per second to the baseline's."""
    limit: float
    """The speedup that ``costs.decode_seconds`` allows on this machine."""
    share_of_limit: float
    mean_depth: float
    block_only_speedup: float | None
    """Speedup of the time in layers alone; None in the device loop, where it is unknown."""
    host_us_per_step: float
    kv_bytes_per_token: float


def load_for(
    name: str,
    model: Transformer,
    *,
    batch: int,
    slots: int,
    lengths: Lengths,
    prompt: int = 1,
    batching: Batching = "depth_wise",
    depth: Depth = None,
    **settings: Any,
) -> SteadyLoad:
    """A steady load on an engine with memory for every token at full depth, or at the deepest of a
    depth budget.

    batch: lanes. prompt: tokens in new prompts. depth: mean depth of all requests; None: the
    model's own rule. settings: further ones of the engine.
    """
    config, weight = model.config, model.embedding.weight
    if lengths.longest + prompt > config.max_seq_len:
        raise ValueError(
            f"a mean of {lengths.mean:g} new tokens draws up to {2 * lengths.mean:g}, but a "
            f"sequence holds {config.max_seq_len}, prompt included; choose a smaller mean"
        )
    longest = min(config.max_seq_len, int(4 * lengths.mean) + 1 + prompt)
    deepest = max(config.num_recursions, budget_of(model, depth).recursions)
    every_recursion = [longest] * deepest
    bytes_per_slot = costs.kv_bytes(config, longest, every_recursion, weight.dtype.itemsize)
    engine_config = EngineConfig(
        max_num_seqs=slots,
        lanes=batch,
        max_len=longest,
        kv_cache_memory=int(slots * bytes_per_slot),
        prefix_caching=False,
        batching=batching,
        depth=depth,
        deepest=deepest,
        **settings,
    )
    with naming(f"{name} at batch {batch} with {slots} slots"):
        return SteadyLoad(name, Engine(model, config=engine_config), lengths, prompt)


def decode_rows(
    baseline: Transformer,
    models: dict[str, Transformer],
    *,
    batch: int,
    slots: int | None,
    lengths: Lengths,
    machine: costs.Machine,
    rounds: int = 5,
    seconds: float = 1.5,
    depths: Sequence[Depth] = (None,),
) -> list[DecodeRow]:
    """The baseline, and each model with each of the depth budgets, at one batch size.

    slots: of each. None: models get as many slots (and lanes) as fit into the bytes that the
    baseline's keys and values take with ``batch`` slots, and at least one.
    """
    base_bytes, loads = _kv_bytes_per_token(baseline, None), list[SteadyLoad]()
    budgets = [(model, name, depth) for name, model in models.items() for depth in depths]
    for model, name, depth in [(baseline, "vanilla", None), *budgets]:
        lanes, own_slots = batch, slots
        if own_slots is None:
            lanes = own_slots = max(1, int(batch * base_bytes / _kv_bytes_per_token(model, depth)))
        label = name if depth is None else f"{name} at {depth}"
        loads.append(
            load_for(label, model, batch=lanes, slots=own_slots, lengths=lengths, depth=depth)
        )
    take_turns(loads, rounds=rounds, seconds=seconds)
    return [_row(load, loads[0], lengths, machine) for load in loads]


def _row(
    load: SteadyLoad, baseline: SteadyLoad, lengths: Lengths, machine: costs.Machine
) -> DecodeRow:
    speedup = median(load.tokens_per_s) / median(baseline.tokens_per_s)
    limit = _ideal_seconds(baseline, lengths, machine) / _ideal_seconds(load, lengths, machine)
    layers_s = median(load.layers_s)
    return DecodeRow(
        model=load.name,
        batch=load.engine.config.lanes or load.engine.config.max_num_seqs,
        slots=load.engine.config.max_num_seqs,
        tokens_per_s=median(load.tokens_per_s),
        speedup=speedup,
        limit=limit,
        share_of_limit=speedup / limit,
        mean_depth=sum(load.shares()),
        block_only_speedup=median(baseline.layers_s) / layers_s if layers_s else None,
        host_us_per_step=1e6 * median(load.host_s),
        kv_bytes_per_token=_kv_bytes_per_token(load.engine.runner.model, load.engine.config.depth),
    )


def _kv_bytes_per_token(model: Transformer, depth: Depth) -> float:
    """As expected: with the model's capacities, or where a mean depth is asked for, with shares
    that have it."""
    config, shares = model.config, list(model.config.capacities)
    if depth == "full":
        shares = [1.0] * config.num_recursions
    elif depth is not None:
        table = table_of(model)
        shares = list(shares_of(corners(config, table.deepest), depth))
    return costs.kv_bytes(config, 1, shares, model.embedding.weight.dtype.itemsize)


def _ideal_seconds(load: SteadyLoad, lengths: Lengths, machine: costs.Machine) -> float:
    """What a token takes at least on this machine, at the depths that were measured."""
    model, config = load.engine.runner.model, load.engine.config
    return costs.decode_seconds(
        model.config,
        machine,
        batch=config.lanes or config.max_num_seqs,
        context=lengths.mean / 2,
        shares=load.shares(),
        dtype_bytes=model.embedding.weight.dtype.itemsize,
    )
