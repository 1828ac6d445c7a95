"""How fast the engine decodes: compared with vanilla in the same engine, with its other ways of
batching, with transformers, and under a load.

    python benchmarks/decode_speed.py  # everything, under ten minutes on two cores
    python benchmarks/decode_speed.py --parts batching --lengths.mean 256
    python benchmarks/decode_speed.py --checkpoint runs/mor3 --baseline runs/vanilla --parts models

Within a part everything takes turns in one process; speeds are medians. The last line is JSON.
Parts: models (MoR-2/3/4 against vanilla of the same depth, with depths drawn uniformly by a random
router, or a trained checkpoint), batching (depth-wise, lock-step, static), transformers, overhead,
latency.
"""

import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import tyro

from mor import checkpoint
from mor.conversion.llama import to_llama
from mor.engine import Engine, EngineConfig, SamplingParams
from mor.engine.bench import Lengths, decode_rows, load_for, measure_machine, take_turns
from mor.model.config import RouterConfig, preset
from mor.model.transformer import Transformer

PROMPT = 16  # tokens, where latency is measured
MODES = ("depth_wise", "lock_step", "auto")
PARTS = ("models", "depths", "batching", "transformers", "overhead", "latency")


@dataclass(frozen=True, kw_only=True)
class Settings:
    preset: str = "smollm-135m"
    num_layers: int = 26
    """Effective depth of every model; 2, 3 and 4 recursions must divide it less the two own
    layers."""
    checkpoint: Path | None = None
    """A trained MoR for the part `models`, instead of random routers; needs --baseline. The other
    parts use random weights in the shape of the preset in any case."""
    baseline: Path | None = None
    batches: tuple[int, ...] = (1, 8, 32)
    depths: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
    """Of the part `depths`."""
    lengths: Lengths = field(default_factory=Lengths)
    rounds: int = 5
    seconds: float = 1.2
    """Length of one turn."""
    threads: int = 2
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: time is what the processor has spent on the benchmark, so that other work on the machine
    counts less; with one thread only."""
    device: str = "cpu"
    dtype: str = "float32"
    parts: tuple[str, ...] = PARTS
    json: bool = False
    """Print the JSON only."""
    out: Path | None = None
    """Also write the JSON there."""


def make(settings, recursions):
    kind = RouterConfig(kind="fixed" if recursions == 1 else "random")
    config = preset(
        settings.preset, num_recursions=recursions, num_layers=settings.num_layers, router=kind
    )
    return placed(settings, Transformer(config).init_weights())


def placed(settings, model):
    return model.eval().to(settings.device, getattr(torch, settings.dtype))


def models(settings):
    if settings.checkpoint:
        _, trained, _ = checkpoint.load(settings.checkpoint)
        _, baseline, _ = checkpoint.load(settings.baseline)
        baseline, tested = (
            placed(settings, baseline),
            {settings.checkpoint.name: placed(settings, trained)},
        )
    else:
        baseline, tested = make(settings, 1), {f"mor-{r}": make(settings, r) for r in (2, 3, 4)}
    machine = measure_machine(torch.device(settings.device), getattr(torch, settings.dtype))
    common = dict(
        lengths=settings.lengths, machine=machine, rounds=settings.rounds, seconds=settings.seconds
    )
    rows = []
    for batch in settings.batches:
        rows += decode_rows(baseline, tested, batch=batch, slots=2 * batch, **common)
    rows += decode_rows(baseline, tested, batch=max(settings.batches), slots=None, **common)
    return dict(rows=[asdict(row) for row in rows], roofline=asdict(machine))


def depths(settings):
    """MoR-3 with depth budgets, against vanilla: whether speed follows from what is spent."""
    machine = measure_machine(torch.device(settings.device), getattr(torch, settings.dtype))
    batch = max(settings.batches)
    rows = decode_rows(
        make(settings, 1),
        {"mor-3": make(settings, 3)},
        batch=batch,
        slots=2 * batch,
        lengths=settings.lengths,
        machine=machine,
        rounds=settings.rounds,
        seconds=settings.seconds,
        depths=settings.depths,
    )
    return [asdict(row) for row in rows]


def batching(settings):
    """The same MoR-3 under each way of batching."""
    model = make(settings, 3)
    ways = [
        ("depth-wise, 64 slots", 32, 64, "depth_wise"),
        ("depth-wise, 32 slots", 32, 32, "depth_wise"),
        ("lock-step", 32, 32, "lock_step"),
        ("static", 32, 32, "static"),
        ("auto, 32 slots", 32, 32, "auto"),
        ("auto, 64 slots", 32, 64, "auto"),
        ("lock-step, 64 slots", 64, 64, "lock_step"),
        ("depth-wise, 64 slots and lanes", 64, 64, "depth_wise"),
    ]
    loads = [
        load_for(name, model, batch=lanes, slots=slots, lengths=settings.lengths, batching=way)
        for name, lanes, slots, way in ways
    ]
    take_turns(loads, rounds=settings.rounds, seconds=2 * settings.seconds)
    slowest = median(loads[2].tokens_per_s)
    return [
        dict(
            batching=x.name,
            tokens_per_s=median(x.tokens_per_s),
            over_lock_step=median(x.tokens_per_s) / slowest,
        )
        for x in loads
    ]


def transformers(settings):
    """Vanilla at the preset's own depth in this engine, in transformers' generate (static batches
    of 32) and in its continuous batching, which is slow here and runs once."""
    model = Transformer(preset(settings.preset)).init_weights()
    llama = placed(settings, to_llama(model))
    model = placed(settings, model)
    generator = torch.Generator().manual_seed(1)
    wide = Lengths(mean=settings.lengths.mean * 3 / 8, deviation=settings.lengths.mean * 3 / 16)
    ragged, equal = wide.draw(96, generator), [int(wide.mean)] * 32
    rows = []
    for name, lengths in (("equal", equal), ("ragged", ragged)):
        found = {"engine": [], "generate": [], "continuous": []}
        for _ in range(settings.rounds):
            found["engine"].append(engine_speed(model, lengths))
            found["generate"].append(generate_speed(llama, lengths))
        found["continuous"].append(continuous_speed(llama, lengths))
        speed = {k: median(v) for k, v in found.items()}
        rows += [
            dict(
                lengths=name,
                who=k,
                tokens_per_s=v,
                engine_over=speed["engine"] / v,
                runs=len(found[k]),
            )
            for k, v in speed.items()
        ]
    return rows


def engine_speed(model, lengths):
    engine = Engine(
        model, config=EngineConfig(max_num_seqs=32, prefix_caching=False, max_len=1 + max(lengths))
    )
    params = [SamplingParams(max_new_tokens=n, temperature=0) for n in lengths]
    start = time.perf_counter()
    engine.generate([[i + 1] for i in range(len(lengths))], params)
    return sum(lengths) / (time.perf_counter() - start)


@torch.inference_mode()
def generate_speed(llama, lengths):
    elapsed = 0.0
    for at in range(0, len(lengths), 32):
        longest = max(lengths[at : at + 32])
        prompts = torch.arange(at + 1, at + 1 + len(lengths[at : at + 32]), device=llama.device)[
            :, None
        ]
        start = time.perf_counter()
        llama.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=longest,
            min_new_tokens=longest,
            pad_token_id=0,
        )
        elapsed += time.perf_counter() - start
    return sum(lengths) / elapsed


@torch.inference_mode()
def continuous_speed(llama, lengths):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    greedy = GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(lengths)
    )
    limits = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64, max_requests_per_batch=32)
    manager = llama.init_continuous_batching(
        generation_config=greedy, continuous_batching_config=limits
    )
    manager.start()
    start = time.perf_counter()
    for i, length in enumerate(lengths):
        manager.add_request([i + 1], max_new_tokens=length)
    done = 0
    while done < len(lengths):
        result = manager.get_result(timeout=60)
        done += result is not None and result.is_finished()
    elapsed = time.perf_counter() - start
    manager.stop(block=True)
    return sum(lengths) / elapsed


def overhead(settings):
    """Time of a step outside layers, routers and head; and how the steps of the last turn divide
    into parts."""
    model, rows = make(settings, 3), []
    for slots in (1, 8, 32, 128, 512):
        load = load_for("", model, batch=slots, slots=slots, lengths=Lengths(mean=8, deviation=2))
        take_turns([load], rounds=settings.rounds, seconds=0.5)
        host, step = median(load.host_s), median(load.step_s)
        whole = sum(load.engine.measured.seconds.values())
        parts = {part: seconds / whole for part, seconds in load.engine.measured.seconds.items()}
        rows.append(
            dict(
                slots=slots, host_us=1e6 * host, step_us=1e6 * step, share=host / step, parts=parts
            )
        )
    return rows


def latency(settings):
    """Poisson arrivals at 70% of the throughput of depth-wise batching, for it, for lock-step
    (sequence-wise) and for the engine's own choice. They take turns, each with a clock of its
    own."""
    model = make(settings, 3)
    lengths = Lengths(mean=settings.lengths.mean / 2, deviation=settings.lengths.deviation / 2)
    full = load_for("", model, batch=32, slots=32, lengths=lengths, prompt=PROMPT, prefill_chunk=32)
    take_turns([full], rounds=3, seconds=settings.seconds)
    rate = 0.7 * median(full.tokens_per_s) / lengths.mean
    arrivals = [Arrivals(model, mode, rate, lengths) for mode in MODES]
    while left := [a for a in arrivals if a.unfinished]:
        min(left, key=lambda a: a.now).step()  # so that disturbances hit all alike
    return [a.found() for a in arrivals]


class Arrivals:
    """Requests that come at random times to one engine. Its clock stands still while others take
    their turns, and passes over the time in which it has nothing to do."""

    def __init__(self, model, mode, rate, lengths, seconds=25.0):
        self.generator = torch.Generator().manual_seed(2)
        gaps = torch.empty(int(2 * rate * seconds) + 1)
        gaps.exponential_(rate, generator=self.generator)
        self.due = [t for t in gaps.cumsum(0).tolist() if t < seconds]
        self.new = lengths.draw(len(self.due), self.generator)
        config = EngineConfig(
            max_num_seqs=32, prefill_chunk=32, batching=mode, prefix_caching=False
        )
        self.engine, self.mode, self.rate = Engine(model, config=config), mode, rate
        self.now, self.sent = 0.0, 0
        self.first, self.between, self.last = [], [], {}

    @property
    def unfinished(self):
        return self.sent < len(self.due) or self.engine.has_unfinished

    def step(self):
        if not self.engine.has_unfinished:
            self.now = max(self.now, self.due[self.sent])
        start = time.perf_counter()
        while self.sent < len(self.due) and self.due[self.sent] <= self.now:
            prompt_ids = torch.randint(0, 40_000, (PROMPT,), generator=self.generator).tolist()
            params = SamplingParams(max_new_tokens=self.new[self.sent], temperature=0)
            self.engine.add_request(prompt_ids, params, request_id=str(self.sent))
            self.sent += 1
        outputs = self.engine.step()
        self.now += time.perf_counter() - start
        for output in outputs:
            name = output.request.request_id
            waited = self.now - self.last.get(name, self.due[int(name)])
            (self.between if name in self.last else self.first).append(waited)
            self.last[name] = self.now

    def found(self):
        found = dict(batching=self.mode, requests=len(self.due), requests_per_s=self.rate)
        for name, values in (("first_token", self.first), ("between_tokens", self.between)):
            found |= {f"{name}_p{p}_ms": 1e3 * float(np.percentile(values, p)) for p in (50, 99)}
        return found


def main():
    settings = tyro.cli(Settings, description=__doc__)
    if (settings.checkpoint is None) != (settings.baseline is None):
        raise SystemExit(
            "--checkpoint and --baseline go together: a speedup needs something to compare with"
        )
    if settings.clock == "cpu":
        if settings.threads != 1:
            raise SystemExit("--clock cpu counts one thread; add --threads 1")
        time.perf_counter = time.thread_time  # of the engine's own measurements, too
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    found = {}
    for part in settings.parts:
        start = time.perf_counter()
        made = globals()[part](settings)
        found |= made if isinstance(made, dict) else {part: made}
        if settings.json:
            continue
        for row in made["rows"] if isinstance(made, dict) else made:
            print(
                part,
                {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()},
                flush=True,
            )
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
    machine = dict(
        device=torch.cuda.get_device_name() if settings.device == "cuda" else platform.machine(),
        dtype=settings.dtype,
        threads=settings.threads,
        clock=settings.clock,
        torch=torch.__version__,
        python=platform.python_version(),
        lengths=asdict(settings.lengths),
        model=f"{settings.preset}, {settings.num_layers} layers",
        checkpoint=settings.checkpoint and settings.checkpoint.name,
    )
    line = json.dumps({**found, "machine": machine})
    if settings.out:
        settings.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
