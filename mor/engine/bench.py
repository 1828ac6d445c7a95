"""How fast an engine decodes, in a steady state: as many requests as it has slots, a new one for
each that ends.

Engines take turns in one process, so that a busy machine disturbs all alike; what counts is ratios
of medians.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from mor.costs import flops as costs
from mor.engine.engine import Engine, EngineConfig
from mor.generation import SamplingParams
from mor.model.config import ModelConfig
from mor.model.transformer import Transformer

LAYERS = ("enter", "block", "coda", "token", "read")


def measure_machine(device: torch.device, dtype: torch.dtype, *, repeats: int = 7) -> costs.Machine:
    """The device's speed in large matrix products and in reading memory, medians."""
    a = torch.randn(1024, 2048, device=device).to(dtype)
    memory = torch.zeros(1 << 26, device=device)
    out, flops = torch.empty_like(a @ a.T), 2 * 1024 * 1024 * 2048
    return costs.Machine(
        flops_per_s=flops
        / median(_timed(lambda: torch.mm(a, a.T, out=out), device) for _ in range(repeats)),
        bytes_per_s=memory.nbytes / median(_timed(memory.sum, device) for _ in range(repeats)),
    )


def _timed(work: Any, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """New tokens of a request: normally distributed, at least 2."""

    mean: float = 64
    deviation: float = 16

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        drawn = torch.randn(count, generator=generator) * self.deviation + self.mean
        return drawn.round().long().clamp(2, max(2, int(2 * self.mean))).tolist()


@dataclass
class SteadyLoad:
    """An engine that is always full. Starts as if it had run for long: with requests at every
    stage."""

    name: str
    engine: Engine
    lengths: Lengths
    prompt: int = 1
    """Tokens in the prompt of a new request."""
    seed: int = 0
    tokens_per_s: list[float] = field(default_factory=list)
    layers_s: list[float] = field(default_factory=list)
    """Seconds in layers for each new token, one number for each turn; zeros where the device loops
    by itself."""
    host_s: list[float] = field(default_factory=list)
    """Seconds for each step outside layers, routers, head and sampling: scheduling, pages, moving
    states."""
    step_s: list[float] = field(default_factory=list)
    depth: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        engine = self.engine
        for length in self.lengths.draw(engine.config.max_num_seqs, self.generator):
            done = int(torch.randint(0, length - 1, (), generator=self.generator))
            self._add(1 + done, length - done)
        while any(r.num_read < len(r.prompt_ids) - 1 for r in engine.requests.values()):
            self._step()

    def turn(self, seconds: float) -> None:
        """Work for about so long and take notes."""
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
        self.host_s.append((elapsed - engine.runner.model_s - measured.seconds["sample"]) / steps)
        self.step_s.append(elapsed / steps)
        self.depth.append((measured.tokens["block"] or measured.tokens["token"]) / new)

    def _step(self) -> None:
        for output in self.engine.step():
            if output.finish_reason:
                self._add(self.prompt, self.lengths.draw(1, self.generator)[0])

    def _add(self, prompt: int, new: int) -> None:
        vocab_size = self.engine.runner.model.config.vocab_size
        ids = torch.randint(0, vocab_size, (prompt,), generator=self.generator).tolist()
        self.engine.add_request(ids, SamplingParams(max_new_tokens=new, temperature=0))


def take_turns(loads: Sequence[SteadyLoad], *, rounds: int, seconds: float) -> None:
    for load in loads:
        load.turn(seconds / 4)
        for notes in (load.tokens_per_s, load.layers_s, load.host_s, load.step_s, load.depth):
            notes.clear()
    for _ in range(rounds):
        for load in loads:
            load.turn(seconds)


@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """One model at one batch size against the baseline. batch: tokens in a pass of the shared
    layers at most;
    slots: requests that run. speedup: ratio of medians of tokens per second. limit: what
    ``costs.decode_seconds`` allows on this machine. block_only_speedup: the same ratio with the
    time in layers alone (None: not known, since the device loops by itself)."""

    model: str
    batch: int
    slots: int
    tokens_per_s: float
    speedup: float
    limit: float
    share_of_limit: float
    mean_depth: float
    block_only_speedup: float | None
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
    **settings: Any,
) -> SteadyLoad:
    """batch: lanes. prompt: tokens in new prompts. settings: further ones of the engine."""
    longest, weight = (
        min(model.config.max_seq_len, int(4 * lengths.mean) + 1 + prompt),
        model.embedding.weight,
    )
    everything = [longest] * model.config.num_recursions
    kv_cache_memory = int(
        slots * costs.kv_bytes(model.config, longest, everything, weight.dtype.itemsize)
    )
    config = EngineConfig(
        max_num_seqs=slots,
        lanes=batch,
        max_len=longest,
        kv_cache_memory=kv_cache_memory,
        prefix_caching=False,
        **settings,
    )
    return SteadyLoad(name, Engine(model, config=config), lengths, prompt)


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
) -> list[DecodeRow]:
    """The baseline and each model at one batch size. slots: of each; None gives models as many
    slots (and lanes) as fit into the bytes that the baseline's keys and values take with ``batch``
    slots."""
    itemsize = baseline.embedding.weight.dtype.itemsize
    bytes_of = {
        name: costs.kv_bytes(model.config, 1, model.config.capacities, itemsize)
        for name, model in {"baseline": baseline, **models}.items()
    }
    fits = {
        name: int(batch * bytes_of["baseline"] / per_token) for name, per_token in bytes_of.items()
    }
    sizes = {
        name: (fits[name], fits[name]) if slots is None else (batch, slots) for name in bytes_of
    }
    loads = {
        name: load_for(name, model, batch=sizes[name][0], slots=sizes[name][1], lengths=lengths)
        for name, model in {"baseline": baseline, **models}.items()
    }
    take_turns(list(loads.values()), rounds=rounds, seconds=seconds)
    base, context = loads["baseline"], lengths.mean / 2
    ideal = {
        name: costs.decode_seconds(
            load.engine.runner.model.config,
            machine,
            batch=sizes[name][0],
            context=context,
            shares=shares(load.engine.runner.model.config, median(load.depth)),
            dtype_bytes=itemsize,
        )
        for name, load in loads.items()
    }
    rows = []
    for name, load in loads.items():
        speedup = median(load.tokens_per_s) / median(base.tokens_per_s)
        limit = ideal["baseline"] / ideal[name]
        rows.append(
            DecodeRow(
                model="vanilla" if load is base else name,
                batch=sizes[name][0],
                slots=sizes[name][1],
                tokens_per_s=median(load.tokens_per_s),
                speedup=speedup,
                limit=limit,
                share_of_limit=speedup / limit,
                mean_depth=median(load.depth),
                block_only_speedup=median(base.layers_s) / median(load.layers_s)
                if any(load.layers_s)
                else None,
                host_us_per_step=1e6 * median(load.host_s),
                kv_bytes_per_token=bytes_of[name],
            )
        )
    return rows


def shares(config: ModelConfig, mean_depth: float) -> list[float]:
    """Share of tokens at each recursion: the configured capacities, moved to a measured mean
    depth."""
    extra = sum(config.capacities[1:])
    factor = (mean_depth - 1) / extra if extra else 0.0
    return [1.0, *(min(1.0, c * factor) for c in config.capacities[1:])]
