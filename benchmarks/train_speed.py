"""Time of a training step against the FLOPs it does: vanilla, recursive and MoR models of equal
depth, interleaved.

    # CPU: d 192, 14 layers, 4x512 tokens, fp32
    python benchmarks/train_speed.py
    # a GPU: 16x2048 tokens, bf16
    python benchmarks/train_speed.py --size 360m --compile

The models take steps in turn, round after round. Every other round runs in reverse order, because
the state of the memory depends on the step before. Times are medians; ratios are medians of the
ratios to vanilla's step of the same round. FLOPs are exact, of the tokens that were really routed.
"""

import json
import platform
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from mor.costs import flops as costs
from mor.model.config import preset
from mor.model.loss import linear_cross_entropy
from mor.model.transformer import Transformer
from mor.training.optim import OptimConfig, build_optimizers

SIZES = {
    "tiny": dict(preset="tiny", num_layers=14, max_seq_len=64),
    "192": dict(preset="mini", num_layers=14, max_seq_len=512),
    "384": dict(preset="small", num_layers=14, max_seq_len=512),
    "576": dict(preset="smollm-135m", num_layers=14, max_seq_len=512, vocab_size=8192),
    "360m": dict(preset="smollm-360m", num_layers=38, max_seq_len=2048),
}
SECTIONS = ("shared blocks", "routing, gather, scatter", "prelude, coda, head", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Settings:
    size: Literal["tiny", "192", "384", "576", "360m"] = "192"
    """Width. tiny only shows that it runs. 360m is the paper's shape with a depth that 1, 2, 3 and
    4 recursions divide."""
    batch: int = 0
    """Sequences; 0: 4 of 512 tokens, or 16 of 2048 for 360m."""
    rounds: int = 6
    threads: int = 1
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    models: tuple[str, ...] = ()
    """Only these rows; vanilla is always there."""
    json: bool = False
    """Only the result for programs."""
    out: Path | None = None
    """Add the result there, a line of JSON: a large size can be measured in pieces, each beside
    vanilla."""


def configs(size):
    shape = dict(SIZES[size])
    name = shape.pop("preset")

    def mor(recursions, router="expert_choice", **settings):
        choices = dict(num_recursions=recursions, router=router, recipe="paper")
        return preset(name, **choices, **shape, **settings)

    return {
        "vanilla": preset(name, **shape),
        "recursive-3": mor(3, "fixed"),
        "mor-2": mor(2),
        "mor-3": mor(3),
        "mor-4": mor(4),
        "mor-3 shared": mor(3, kv_strategy="shared"),
        "mor-3 token": mor(3, "token_choice"),
    }


@torch.no_grad()
def drawn(config, device):
    """A model with weights as at the start of training, drawn on the device itself: on the host, a
    large one takes longer than it is measured."""
    torch.manual_seed(0)
    with device:
        model = Transformer(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=config.init_std)
        else:
            parameter.fill_(1.0)
    return model


class Ours:
    def __init__(self, config, options, device):
        self.config, self.device = config, device
        self.model = drawn(config, device)
        if options.compile:
            self.model.compile_blocks()

    def loss(self, tokens, targets):
        self.output = self.model(tokens, targets_BT=targets, selection="topk")
        return self.output.nll + self.output.routing.weighted_loss

    def flops(self):
        return 3 * costs.forward_flops(self.config, routed(self.config, self.output.routing))


class Llama:
    """transformers' Llama with vanilla's shape and SDPA; the head's loss is ours for both."""

    def __init__(self, config, options, device):
        from transformers import LlamaConfig, LlamaModel

        shape = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_seq_len,
            attn_implementation="sdpa",
        )
        self.config = config
        self.model = LlamaModel(shape).to(device)
        if options.compile:
            self.model.compile()

    def loss(self, tokens, targets):
        hidden = self.model(input_ids=tokens, use_cache=False).last_hidden_state
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.model.embed_tokens.weight, targets.flatten()
        )

    def flops(self):
        return None


def routed(config, routing):
    """The work of a forward as it was routed, token-choice included."""
    tokens, pairs = routing.tokens, []
    for step in routing.steps:
        own = config.kv_strategy == "recursion_wise"
        seen = step.tokens.rank if own else step.tokens.position
        pairs.append(float((seen + 1).sum()))
    return costs.Workload(
        tokens=len(tokens),
        kept=routing.tokens_per_recursion(),
        own_pairs=float((tokens.position + 1).sum()),
        pairs=pairs,
        logits=len(tokens),
    )


class Trainer:
    """A model with its optimizer, on one batch."""

    def __init__(self, made, options, device):
        self.made, self.device, self.times = made, device, []
        self.optimizers = build_optimizers(made.model, OptimConfig(lr=1e-4))
        config = made.config
        batch = options.batch or (16 if options.size == "360m" else 4)
        shape = (batch, config.max_seq_len + 1)
        lines = torch.randint(
            config.vocab_size, shape, generator=torch.Generator().manual_seed(0)
        ).to(device)
        self.tokens, self.targets = lines[:, :-1], lines[:, 1:]

    def step(self):
        cuda = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            loss = self.made.loss(self.tokens, self.targets)
        loss.backward()
        self.optimize()

    def optimize(self):
        torch.nn.utils.clip_grad_norm_(self.made.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def timed_step(self):
        finish(self.device)
        started = time.perf_counter()
        self.step()
        finish(self.device)
        self.times.append(time.perf_counter() - started)

    def peak_bytes(self):
        """Weights, moments, gradients, activations and temporaries in one step."""
        if self.device.type == "cuda":
            others = torch.cuda.memory_allocated() - self.resident_bytes()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated() - others
        return allocated_peak(self.step) + self.resident_bytes()

    def resident_bytes(self):
        moments = [
            v
            for o in self.optimizers
            for s in o.state.values()
            for v in s.values()
            if torch.is_tensor(v)
        ]
        return sum(t.nbytes for t in (*self.made.model.parameters(), *moments))


def allocated_peak(step):
    """Largest sum of what ``step`` allocates on the CPU, bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    held = peak = 0
    # events() leaves out what belongs to an operation
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Sections:
    """Where the time of a step goes, by stamps at the borders of modules, forward and backward."""

    def __init__(self, trainer):
        self.trainer, self.stamps = trainer, []
        model = trainer.made.model
        self.handles = []
        for name, module in [
            ("recursions", model.recursions),
            *(("blocks", b) for b in model.recursions.shared_blocks),
        ]:
            self.handles += [
                module.register_forward_pre_hook(lambda *_, n=name: self.stamp(n, 1)),
                module.register_forward_hook(lambda *_, n=name: self.stamp(n, -1)),
                module.register_full_backward_pre_hook(lambda *_, n=name: self.stamp(n, 1)),
                module.register_full_backward_hook(lambda *_, n=name: self.stamp(n, -1)),
            ]

    def stamp(self, name, change):
        finish(self.trainer.device)
        self.stamps.append((time.perf_counter(), name, change))

    def split(self):
        """Seconds of each section in one step."""
        self.stamps = []
        optimize, trainer = self.trainer.optimize, self.trainer
        trainer.optimize = lambda: (
            self.stamp("optimizer", 1),
            optimize(),
            self.stamp("optimizer", -1),
        )
        self.stamp("step", 1)
        trainer.step()
        self.stamp("step", -1)
        trainer.optimize = optimize
        spent, open_, before = dict.fromkeys(SECTIONS, 0.0), [], None
        for at, name, change in self.stamps:
            if before is not None:
                spent[section(open_)] += at - before
            open_ = [*open_, name] if change > 0 else open_[:-1]
            before = at
        return spent

    def remove(self):
        for handle in self.handles:
            handle.remove()


def section(open_):
    for name, place in zip(("optimizer", "blocks", "recursions"), (3, 0, 1), strict=True):
        if name in open_:
            return SECTIONS[place]
    return SECTIONS[2]


def measure(options, device):
    made = {
        name: Ours(config, options, device)
        for name, config in configs(options.size).items()
        if wanted(options, name)
    }
    if wanted(options, "llama"):
        made["llama"] = Llama(configs(options.size)["vanilla"], options, device)
    trainers = {name: Trainer(m, options, device) for name, m in made.items()}
    for trainer in trainers.values():  # warms up
        trainer.step()
    for round_ in range(options.rounds):
        for trainer in list(trainers.values())[:: -1 if round_ % 2 else 1]:
            trainer.timed_step()
    return [row(name, trainer, trainers["vanilla"], options) for name, trainer in trainers.items()]


def wanted(options, name):
    return not options.models or name in (*options.models, "vanilla")


def row(name, trainer, vanilla, options):
    ratio = statistics.median(a / b for a, b in zip(trainer.times, vanilla.times, strict=True))
    found = dict(
        model=name,
        us_per_token=statistics.median(trainer.times) / trainer.tokens.numel() * 1e6,
        peak_mb=trainer.peak_bytes() / 1e6,
        time_ratio=ratio,
    )
    if trainer.made.flops() is not None:
        flops = trainer.made.flops() / vanilla.made.flops()
        found |= dict(
            flop_ratio=flops, time_over_flops=ratio / flops, mean_depth=mean_depth(trainer)
        )
        found["split"] = split(trainer) if not options.compile else None
    return found


def mean_depth(trainer):
    return sum(trainer.made.output.routing.tokens_per_recursion()) / trainer.tokens.numel()


def split(trainer, steps=3):
    sections = Sections(trainer)
    spent = [sections.split() for _ in range(steps)]
    sections.remove()
    total = sum(sum(s.values()) for s in spent)
    return {name: sum(s[name] for s in spent) / total for name in SECTIONS}


def show(rows):
    print(
        f"{'model':14} {'us/token':>9} {'peak MB':>8} {'time':>6} {'FLOPs':>6} {'time/FLOPs':>10}  "
        "split of a step"
    )
    for r in rows:
        flops = (
            f"{r['flop_ratio']:6.3f} {r['time_over_flops']:10.3f}"
            if "flop_ratio" in r
            else " " * 17
        )
        parts = "  ".join(
            f"{name} {100 * share:.1f}%" for name, share in (r.get("split") or {}).items()
        )
        print(
            f"{r['model']:14} {r['us_per_token']:9.2f} {r['peak_mb']:8.1f} {r['time_ratio']:6.3f} "
            f"{flops}  {parts}"
        )


def main():
    options = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(options.threads)
    kind = (
        options.device
        if options.device != "auto"
        else "cuda"
        if torch.cuda.is_available()
        else "cpu"
    )
    device = torch.device(kind)
    rows = measure(options, device)
    if not options.json:
        show(rows)
    machine = dict(
        device=torch.cuda.get_device_name()
        if kind == "cuda"
        else platform.processor() or platform.machine(),
        threads=options.threads,
        torch=torch.__version__,
        python=platform.python_version(),
    )
    asked = {k: v for k, v in asdict(options).items() if k not in ("json", "out")}
    result = json.dumps(dict(rows=rows, settings=asked, machine=machine))
    if options.out is not None:
        with options.out.open("a") as lines:
            lines.write(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
