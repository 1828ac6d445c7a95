"""The stages of gpu_acceptance.py: what each one tries, and what it promises.

Correctness compares with the CPU in float32, or with the plain decoder on the same device. Speeds
are medians; ratios are of things that took turns.

E entries of a pool · G key/value heads · H head dim · M queries · N heads
"""

from __future__ import annotations

import gc
import importlib.metadata
import io
import json
import math
import os
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
import train_speed
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mor import checkpoint
from mor.costs import flops as costs
from mor.data.config import DataConfig
from mor.data.stream import Windows
from mor.device import peak_flops_per_s, pick_device
from mor.engine import Engine, EngineConfig, SamplingParams
from mor.engine.attention import decode_attention, gathered_attention
from mor.engine.bench import Lengths, SteadyLoad, decode_rows, load_for, measure_machine
from mor.evaluation.nll import evaluate
from mor.files import remove_folder
from mor.generation import generate, sample
from mor.model.attention import attention
from mor.model.config import ModelConfig, RouterConfig, layout, preset
from mor.model.other_depths import RouterAround
from mor.model.packing import PackedTokens
from mor.model.routers import Router
from mor.model.routing import Decision, Memory, Routing
from mor.model.transformer import Transformer
from mor.run_folder import RunFolder
from mor.training.config import TrainConfig
from mor.training.loop import train

KV_STRATEGIES = ("recursion_wise", "shared", "hybrid")
ROUTERS = {
    "fixed": RouterConfig(),
    "expert": RouterConfig(kind="expert_choice"),
    "expert-aux": RouterConfig(
        kind="expert_choice", causal_selection="aux_router", gate="residual"
    ),
    "token": RouterConfig(kind="token_choice"),
    "random": RouterConfig(kind="random"),
    "frequency": RouterConfig(kind="frequency"),
}
VOCAB = 331
GREEDY = SamplingParams(max_new_tokens=12, temperature=0)
SAMPLED = SamplingParams(max_new_tokens=12, temperature=0.8, top_k=20, top_p=0.95, seed=3)


@dataclass(frozen=True)
class Result:
    """One line. holds: whether a promise is kept; None for a figure that promises nothing.
    detail: the promise, or the unit; after a failure, what was said."""

    stage: str
    name: str
    value: Any
    detail: str = ""
    holds: bool | None = None


@dataclass(frozen=True)
class Bench:
    """Where a stage runs, and how it says what it found. tiny: small sizes; speeds are then figures
    without a promise."""

    stage: str
    device: torch.device
    tiny: bool

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def figure(self, name: str, value: Any, unit: str = "") -> None:
        self._say(Result(self.stage, name, value, unit))

    def promise(self, name: str, holds: bool, value: Any, promise: str) -> None:
        self._say(Result(self.stage, name, value, promise, bool(holds)))

    def at_most(self, name: str, value: float, most: float) -> None:
        """A promise of speed or memory, which tiny sizes are not held to."""
        self._speed(name, value, value <= most, f"at most {most:g}")

    def at_least(self, name: str, value: float, least: float) -> None:
        self._speed(name, value, value >= least, f"at least {least:g}")

    def _speed(self, name: str, value: float, holds: bool, promise: str) -> None:
        if self.tiny:
            self.figure(name, value, f"{promise} at full size")
        else:
            self.promise(name, holds, value, promise)

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """What fails inside is a broken promise of that name, and the stage goes on."""
        try:
            yield
        except Exception:
            self.promise(name, False, None, "\n".join(traceback.format_exc().splitlines()[-6:]))

    @staticmethod
    def _say(result: Result) -> None:
        print("=" + json.dumps(asdict(result)), flush=True)


def small(router: RouterConfig, kv_strategy: str) -> Transformer:
    """A model that is quick on the CPU and really routes."""
    shape = dict(dim=96, num_heads=6, num_kv_heads=2, head_dim=16, ffn_dim=160)
    config = ModelConfig(
        vocab_size=VOCAB,
        max_seq_len=256,
        router=router,
        kv_strategy=kv_strategy,
        **shape,
        **layout(8, 3, "middle_cycle"),
    )
    model = Transformer(config).init_weights(0)
    with torch.no_grad():  # larger than at the start of training, so that scores differ
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    return model


def models(bench: Bench) -> Iterator[tuple[str, Transformer]]:
    """Each router with each KV strategy; two of them if tiny."""
    for i, (name, router) in enumerate(ROUTERS.items()):
        for j, kv_strategy in enumerate(KV_STRATEGIES):
            if not bench.tiny or (i in (1, 3) and i == j + 1):
                yield f"{name}, {kv_strategy}", small(router, kv_strategy)


def some_models(bench: Bench) -> Iterator[tuple[str, Transformer]]:
    """Every router once, and every KV strategy twice; two of them if tiny."""
    for i, (name, router) in enumerate(ROUTERS.items()):
        if not bench.tiny or i in (1, 3):
            kv_strategy = KV_STRATEGIES[i % 3]
            yield f"{name}, {kv_strategy}", small(router, kv_strategy)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    return [draw(1 + 7 * i % longest, seed=i).tolist() for i in range(count)]


# Stages


def environment(bench: Bench) -> None:
    """What there is, and which attention kernels PyTorch takes for the shapes of training."""
    for package in ("torch", "triton", "transformers", "numpy"):
        try:
            bench.figure(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            bench.figure(package, "not installed")
    bench.figure("python", platform.python_version())
    if bench.on_cuda:
        found = torch.cuda.get_device_properties(bench.device)
        bench.figure("GPU", found.name, f"sm{found.major}{found.minor}")
        bench.figure("memory", found.total_memory / 1e9, "GB")
        bench.figure("CUDA", torch.version.cuda)
        peak = peak_flops_per_s(bench.device)
        bench.promise("peak is known", peak is not None, peak, "FLOP/s in bfloat16, for the MFU")
    for name, dtype, masked in (
        ("causal, bfloat16", torch.bfloat16, False),
        ("masked, bfloat16", torch.bfloat16, True),
        ("masked, float32", torch.float32, True),
    ):
        with bench.trying(f"kernel: {name}"):
            kernel = attention_kernel(bench, dtype, masked)
            bench.promise(f"kernel: {name}", kernel != "math", kernel, "a fused one")


def attention_kernel(bench: Bench, dtype: torch.dtype, masked: bool) -> str:
    """Which kernel grouped-query attention of 256 tokens runs, forward."""
    q, k = (torch.randn(2, 256, n, 64, device=bench.device, dtype=dtype) for n in (15, 5))
    mask = torch.ones(2, 256, 256, dtype=torch.bool, device=bench.device).tril() if masked else None
    kind = ProfilerActivity.CUDA if bench.on_cuda else ProfilerActivity.CPU
    attention(q, k, k, mask)
    with profile(activities=[kind]) as seen:
        attention(q, k, k, mask)
        bench.wait()
    names = " ".join(event.key.lower() for event in seen.key_averages())
    marks = dict(cudnn="cudnn", flash="flash", fmha="efficient", flex="flex")
    return next((kernel for mark, kernel in marks.items() if mark in names), "math")


def capture(bench: Bench) -> None:
    """The loop on the device, a CUDA graph there, for every router, KV strategy, sampling mode and
    dtype; the tokens are the plain decoder's."""
    asked = prompts(3)
    for name, model in models(bench):
        for dtype in (torch.float32, torch.bfloat16):
            model = model.to(bench.device, dtype)
            for mode, params in (("greedy", GREEDY), ("sampled", SAMPLED)):
                title = f"{name}, {mode}, {str(dtype).removeprefix('torch.')}"
                with bench.trying(title):
                    settings = EngineConfig(loop="device", max_num_seqs=4, lanes=3, compile=False)
                    got = Engine(model, config=settings).generate(asked, params)
                    agreement(bench, title, model, asked, params, got)


NEAR_TIE = 1e-3
"""Candidates whose logits are closer may be decided by the order of sums."""


def agreement(
    bench: Bench,
    title: str,
    model: Transformer,
    asked: list[list[int]],
    params: SamplingParams,
    got: Sequence[Answer],
) -> None:
    """In float32 every request equals the plain decoder's, up to where two candidates nearly tie:
    that is computed again. In bfloat16 ties are too many to tell, so there some requests must be
    equal, and all complete."""
    want = generate(model, asked, params)
    places = [first_difference(g, w) for g, w in zip(got, want, strict=True)]
    share = places.count(None) / len(places)
    if model.embedding.weight.dtype == torch.bfloat16:
        complete = all(len(r.token_ids) == params.max_new_tokens for r in got)
        promise = "complete; share equal to the plain decoder: above 0"
        bench.promise(title, complete and share > 0, share, promise)
        return
    gaps = [
        gap(model, g, w, place, params)
        for g, w, place in zip(got, want, places, strict=True)
        if place is not None
    ]
    promise = f"share equal to the plain decoder: 1, but for ties closer than {NEAR_TIE}"
    if gaps:
        promise += f"; here they are {', '.join(f'{x:.2g}' for x in gaps)} apart"
    bench.promise(title, all(x < NEAR_TIE for x in gaps), share, promise)


class Answer(Protocol):
    """What an engine and the plain decoder both give."""

    prompt_ids: list[int]
    token_ids: list[int]
    depths: list[int]


def first_difference(got: Answer, want: Answer) -> int | None:
    """The position whose depth, or whose next token, is the first that differs."""
    prompt = len(want.prompt_ids)
    for i in range(max(len(got.depths), len(want.depths))):
        new = max(0, i + 2 - prompt)  # tokens that are known after this position
        if (got.depths[: i + 1], got.token_ids[:new]) != (
            want.depths[: i + 1],
            want.token_ids[:new],
        ):
            return i
    return None


@torch.no_grad()
def gap(model: Transformer, got: Answer, want: Answer, place: int, params: SamplingParams) -> float:
    """How far apart, at the first difference, what the plain model computes there is from what
    would lead to the other answer."""
    ids = [*want.prompt_ids, *want.token_ids][: place + 1]
    out = model(torch.tensor([ids], device=model.embedding.weight.device))
    if got.depths[place : place + 1] != want.depths[place : place + 1]:
        return depth_gap(model, out.routing)
    drawn = place + 1 - len(want.prompt_ids)
    return token_gap(out.logits_BTV[0, -1].float(), params, drawn, got.token_ids[drawn])


def token_gap(logits: Tensor, params: SamplingParams, drawn: int, token: int) -> float:
    """To the best logit; for a draw, the least change of logits that was found to lead to it."""
    if params.temperature == 0:
        return float(logits.max() - logits[token])
    generator = torch.Generator(logits.device).manual_seed(0)
    for most in (1e-5, 1e-4, NEAR_TIE / 2):
        for _ in range(100):
            noise = torch.rand(logits.shape, generator=generator, device=logits.device)
            if sample(logits + most * (2 * noise - 1), params, drawn) == token:
                return most
    return float("inf")


def depth_gap(model: Transformer, routing: Routing) -> float:
    """Of the last token's decisions, the one nearest to the other way; inf if no score decides."""
    if "wish" in routing.memory:  # token-choice: the best of these scores
        score_R = routing.memory["score"][-1] + model.router.bias_R
        best = score_R.topk(2).values
        return float(best[0] - best[1])
    gaps = [float("inf")]
    for step in routing.steps:
        logit, threshold = step.decision.causal_logit, model.router.threshold(step.recursion)
        is_asked = bool((step.candidates.place == routing.tokens.place[-1]).any())
        if is_asked and step.decision.takes is not None and logit is not None and threshold:
            gaps.append(abs(float(logit[-1]) - math.log(threshold / (1 - threshold))))
    return min(gaps)


def kernel(bench: Bench) -> None:
    """The decoding kernel of this device against its definition."""
    dtypes = (torch.float32, torch.bfloat16) if bench.on_cuda else (torch.float32,)
    for dtype in dtypes:
        attend = decode_attention("triton" if bench.on_cuda else "auto", bench.device, dtype)
        for heads in ((4, 2, 6), (15, 5, 64), (8, 1, 128), (2, 2, 20)):
            for longest in (1, 300) if bench.tiny else (1, 65, 4096):
                name = f"{str(dtype).removeprefix('torch.')}, {heads}, {longest} entries"
                with bench.trying(name):
                    error = kernel_error(bench.device, attend, dtype, heads, longest)
                    most = 1e-5 if dtype == torch.float32 else 2e-2
                    bench.promise(name, error <= most, error, f"largest error at most {most}")


def kernel_error(
    device: torch.device,
    attend: Any,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    longest: int,
) -> float:
    """Largest difference to the definition in float32."""
    N, G, H = heads
    generator = torch.Generator().manual_seed(longest)
    shapes = ((7, N, H), (longest + 50, G, H), (longest + 50, G, H))
    q_MNH, k_EGH, v_EGH = (
        torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes
    )
    table = [torch.randperm(longest + 50, generator=generator)[:longest] for _ in range(5)]
    seen = torch.randint(1, longest + 1, (7,), generator=generator).int()
    seen[0] = longest
    places = (
        torch.stack(table).int().to(device),
        torch.tensor([0, 4, 2, 2, 1, 3, 0]).int().to(device),
        seen.to(device),
    )
    got = attend(q_MNH, k_EGH, v_EGH, *places, longest=longest)
    exact = (t.float() for t in (q_MNH, k_EGH, v_EGH))
    want = gathered_attention(*exact, *places, longest=longest)
    return float((got.float() - want).abs().max())


def gradients(bench: Bench) -> None:
    """Loss and gradients of a training forward against the CPU: whole rows, recomputed, documents,
    rows of odd lengths."""
    documents = (torch.arange(61) // 23).expand(4, 61)
    odd = torch.arange(61) < torch.tensor([[61], [37], [1], [58]])
    ways: dict[str, dict[str, Any]] = {
        "whole": {},
        "recomputed": dict(recompute=True),
        "documents": dict(documents_BT=documents),
        "odd lengths": dict(mask_BT=odd),
    }
    for name, model in models(bench):
        for way, settings in ways.items():
            with bench.trying(f"{name}, {way}"):
                error = gradient_error(bench, model, settings)
                promise = "relative error at most 1e-3"
                bench.promise(f"{name}, {way}", error <= 1e-3, error, promise)


def gradient_error(bench: Bench, model: Transformer, settings: dict[str, Any]) -> float:
    """Of tokens that take the same recursions on both: where two of them nearly tie for a place,
    others are drawn, twice at most."""
    for seed in (1, 2, 3):
        tokens = draw(4, 61, seed=seed)
        want, depth = loss_and_gradient(model.to("cpu"), tokens, settings)
        got, depth_here = loss_and_gradient(model.to(bench.device), tokens, settings)
        if torch.equal(depth, depth_here):
            return float((got - want).norm() / want.norm())
    return float("inf")


def loss_and_gradient(
    model: Transformer, tokens: Tensor, settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Both in one vector, and the depth of every token, on the CPU."""
    device = model.embedding.weight.device
    placed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in settings.items()}
    model.zero_grad()
    targets = tokens.roll(-1, 1).to(device)
    out = model(tokens.to(device), targets_BT=targets, selection="topk", **placed)
    assert out.nll is not None
    loss = out.nll + out.routing.weighted_loss
    loss.backward()
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([loss.detach()[None], *parts]).cpu(), out.routing.depth.cpu()


def engine(bench: Bench) -> None:
    """The engine where it is pressed, against the plain decoder. (``capture`` tries the loop of
    every model alone.)"""
    beginning = draw(48).tolist()
    cases: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
        "shared beginnings": ([[*beginning, i] for i in range(8)], dict(max_num_seqs=3)),
        "too little memory": (prompts(12), dict(max_num_seqs=8, page_size=4)),
        # Lock-step and depth-wise, as many as run.
        "by load": (prompts(12), dict(loop="host", max_num_seqs=5, lanes=3)),
    }
    for name, model in some_models(bench):
        model = model.to(bench.device)
        for case, (asked, settings) in cases.items():
            if case == "too little memory":
                settings |= dict(kv_cache_memory=scarce(model))
            for mode, params in (("greedy", GREEDY), ("sampled", SAMPLED)):
                with bench.trying(f"{name}, {case}, {mode}"):
                    it = Engine(model, config=EngineConfig(compile=False, **settings))
                    got = it.generate(asked, params)
                    agreement(bench, f"{name}, {case}, {mode}", model, asked, params, got)
                    if case == "shared beginnings":
                        hits = it.stats()["prefix_hits"]
                        bench.promise(f"{name}, {case}, {mode}: hits", hits > 0, hits, "some")


def compiled(bench: Bench) -> None:
    """The engine as it is by default, which on CUDA compiles what it runs: one model whose passes
    do all that there is, since nearly all the time is the compiler's."""
    asked, router = prompts(12), ROUTERS["expert-aux"]
    model = small(router, "hybrid").to(bench.device)
    for mode, params in (("greedy", GREEDY), ("sampled", SAMPLED)):
        with bench.trying(mode):
            it = Engine(model)
            agreement(bench, mode, model, asked, params, it.generate(asked, params))
            if bench.on_cuda:
                did = it.runner.compiled
                bench.promise(f"{mode}: compiled", did, did, "did not fall back")


def scarce(model: Transformer) -> int:
    """Bytes for about two requests of the longest kind."""
    config, length = model.config, 60
    every = [length] * config.num_recursions
    return int(2.5 * costs.kv_bytes(config, length, every, model.embedding.weight.dtype.itemsize))


def training(bench: Bench) -> None:
    """Train as by default on this device (on CUDA bfloat16, compiled), trace, save, resume, and
    evaluate."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        rows = [{"text": f"The square of {i} is {i * i}. " * 6} for i in range(120)]
        text.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for router in ("expert_choice", "token_choice")[: 1 if bench.tiny else 2]:
            with bench.trying(router):
                train_and_resume(bench, router, text, Path(folder) / router)


def train_and_resume(bench: Bench, router: str, text: Path, out: Path) -> None:
    shape = dict(num_layers=8, num_recursions=3, router=router, max_seq_len=64)
    config = TrainConfig(
        model=preset("tiny", **shape),
        data=DataConfig(path=str(text), tokenizer="bytes"),
        out=str(out),
        steps=8 if bench.tiny else 40,
        batch_size=8,
        seq_len=64,
        save_every=4 if bench.tiny else 20,
        keep=0,
        log_every=1,
        eval_every=8 if bench.tiny else 20,
        device=str(bench.device),
        profile=2,
    )
    run = RunFolder(out)
    did = train(config, console=Console(file=io.StringIO())).state.model.is_compiled
    bench.promise(f"{router}: compiled on CUDA", did == bench.on_cuda, did, "did not fall back")
    first = losses(run)
    fell = first[-1] / first[0]
    bench.promise(f"{router}: loss falls", fell < 0.95, fell, "last over first: below 0.95")
    bench.promise(f"{router}: traced", run.trace.is_file(), str(run.trace.name), "written")
    remove_folder(run.checkpoints()[-1])  # as if killed after the one before
    again = train(config, resume=True, console=Console(file=io.StringIO()))
    difference = max(abs(a - b) for a, b in zip(first, losses(run), strict=True))
    most = 2e-2 if bench.on_cuda else 0.0
    bench.promise(f"{router}: resumed", difference <= most, difference, f"nats, at most {most}")
    here, on_cpu = (checkpoint.load(out, device=d).model for d in (bench.device, "cpu"))
    evaluated(bench, router, here, on_cpu, again.corpus.validation)


def evaluated(
    bench: Bench, router: str, here: Transformer, on_cpu: Transformer, data: Windows
) -> None:
    """In float32 as on the CPU. And in the device's own precision as in float32, all at full depth:
    at its own depth a rounded score would now and then fall on the other side of its threshold."""

    def nll(model: Transformer, **settings: Any) -> float:
        return evaluate(model, data, seq_len=64, **settings).nll

    difference = abs(nll(here, precision="float32") - nll(on_cpu))
    promise = "nats from the CPU in float32, at most 1e-3"
    bench.promise(f"{router}: evaluated", difference <= 1e-3, difference, promise)
    deep = FullDepth(here.router)
    difference = abs(nll(here, router=deep) - nll(here, router=deep, precision="float32"))
    promise = "nats from float32 here, at full depth, at most 2e-2"
    bench.promise(f"{router}: evaluated as by default", difference <= 2e-2, difference, promise)


class FullDepth(RouterAround):
    """Every token takes every recursion; gates are those of the router inside."""

    def __init__(self, inner: Router) -> None:
        super().__init__(inner)
        self.is_hierarchical = self.has_topk = False

    def start(self, x_MD: Tensor, tokens: PackedTokens, max_depth: int) -> Memory:
        depth = torch.full_like(tokens.row, max_depth)
        return self.inner.with_depth(self.inner.start(x_MD, tokens, max_depth), depth)

    def decide(self, *asked: Any) -> Decision:
        return replace(self.inner.decide(*asked), takes=None, rank=None)


def losses(run: RunFolder) -> list[float]:
    return [row["loss"] for row in run.read_metrics() if "loss" in row]


def train_time(bench: Bench) -> None:
    """A training step of each MoR beside vanilla's: time, memory, use of the GPU."""
    size = "tiny" if bench.tiny else "360m"
    rounds = 2 if bench.tiny else 6
    for name in ("mor-2", "mor-3", "mor-4")[: 1 if bench.tiny else 3]:
        gc.collect()  # compiled blocks and their models hold each other
        torch.cuda.empty_cache()
        with bench.trying(name):
            options = train_speed.Settings(
                size=size,
                models=(name,),
                rounds=rounds,
                compile=bench.on_cuda,
                device=bench.device.type,
            )
            vanilla, row = train_speed.measure(options, bench.device)
            bench.figure(f"{name}: FLOPs over vanilla", row["flop_ratio"])
            bench.at_most(f"{name}: time over FLOPs", row["time_over_flops"], 1.05)
            most = {"mor-2": (0.80, 0.75)}.get(name, (1.0, 1.0))
            bench.at_most(f"{name}: time over vanilla", row["time_ratio"], most[0])
            memory = row["peak_mb"] / vanilla["peak_mb"]
            bench.at_most(f"{name}: peak memory over vanilla", memory, most[1])
            use_of_the_gpu(bench, options.size, name, vanilla["us_per_token"], row["us_per_token"])


def use_of_the_gpu(bench: Bench, size: str, name: str, vanilla_us: float, us: float) -> None:
    """MFU: FLOPs that the model asks for, over what the GPU could do in that time."""
    peak = peak_flops_per_s(bench.device)
    for who, us_per_token in (("vanilla", vanilla_us), (name, us)):
        config = train_speed.configs(size)[who]
        per_token = costs.train_flops(config, config.max_seq_len) / config.max_seq_len
        done = per_token / (us_per_token * 1e-6)
        bench.figure(f"{who} beside {name}", done / 1e12, "TFLOP/s")
        if peak is not None and who == "vanilla":
            bench.at_least(f"{who} beside {name}: MFU", done / peak, 0.40)
        elif peak is not None:
            bench.figure(f"{name}: MFU", done / peak)


def decoding(bench: Bench) -> None:
    """MoR-2/3/4 against vanilla of the same depth, tokens at random depths: at one batch size, and
    at the most requests that fit into the bytes of vanilla's keys and values."""
    dtype = torch.bfloat16 if bench.on_cuda else torch.float32
    made = {f"mor-{r}": decoder(bench, r, dtype) for r in ((4,) if bench.tiny else (2, 3, 4))}
    machine = measure_machine(bench.device, dtype)
    bench.figure("matrix products", machine.flops_per_s / 1e12, "TFLOP/s")
    bench.figure("reading memory", machine.bytes_per_s / 1e9, "GB/s")
    vanilla, batch = decoder(bench, 1, dtype), 4 if bench.tiny else 32
    common: dict[str, Any] = dict(
        lengths=Lengths(mean=12, deviation=3) if bench.tiny else Lengths(),
        machine=machine,
        rounds=2 if bench.tiny else 4,
        seconds=0.05 if bench.tiny else 0.4,
    )
    for kind, slots in (("batch 32", 2 * batch), ("equal KV bytes", None)):
        with bench.trying(kind):
            for row in decode_rows(vanilla, made, batch=batch, slots=slots, **common):
                bench.figure(f"{kind}: {row.model}", row.tokens_per_s, "tokens/s")
                if row.model == "vanilla":
                    continue
                bench.figure(f"{kind}: {row.model} over vanilla", row.speedup)
                bench.at_least(f"{kind}: {row.model}, share of roofline", row.share_of_limit, 0.9)
                if row.model == "mor-4" and slots is None:
                    bench.at_least("MoR-4 at the largest batch over vanilla", row.speedup, 2.06)
    for name, model in {"vanilla": vanilla, **made}.items():
        with bench.trying(f"{name}: a pass"):
            parts_of_a_launch(bench, name, model, batch, common["lengths"])


def decoder(bench: Bench, recursions: int, dtype: torch.dtype) -> Transformer:
    router = RouterConfig(kind="fixed" if recursions == 1 else "random")
    name, layers = ("tiny", 14) if bench.tiny else ("smollm-360m", 38)
    config = preset(name, num_recursions=recursions, num_layers=layers, router=router)
    return train_speed.drawn(config, bench.device).to(dtype).eval()


def parts_of_a_launch(
    bench: Bench, name: str, model: Transformer, batch: int, lengths: Lengths
) -> None:
    """Time of one pass of the shared block over full lanes, and what of a step is not the
    device's work."""
    load = load_for(name, model, batch=batch, slots=2 * batch, lengths=lengths, loop="device")
    seconds = 0.05 if bench.tiny else 0.5
    load.turn(seconds)
    steps = load.engine.strategy.steps
    with torch.inference_mode():
        block_s = seconds_of(bench, lambda: steps._block(batch, steps.blocks[0][0]))
    bench.figure(f"{name}: block alone", 1e6 * block_s, "us a pass")
    if bench.on_cuda:
        share = min(host_share(load, seconds, TimedGraph) for _ in range(3))
        bench.at_most(f"{name}: host's share of a step", share, 0.03)


class TimedGraph:
    """A graph whose replays the device times by itself."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self.graph, self.events = graph, list[tuple[torch.cuda.Event, torch.cuda.Event]]()

    def replay(self) -> None:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        self.graph.replay()
        after.record()
        self.events.append((before, after))

    def seconds(self) -> float:
        """Of all replays, which have ended."""
        return sum(before.elapsed_time(after) for before, after in self.events) / 1e3


def host_share(load: SteadyLoad, seconds: float, timed_graph: Callable[[Any], Any]) -> float:
    """Share of a turn in which the device replays none of the engine's graphs. It is the host's:
    choosing requests, reserving places, taking tokens, and the copies in and out."""
    steps = load.engine.strategy.steps
    graphs = steps.graphs
    steps.graphs = {key: timed_graph(graph) for key, graph in graphs.items()}
    started = time.perf_counter()
    load.turn(seconds)  # ends by waiting for the device
    elapsed = time.perf_counter() - started
    there = {key: graph for key, graph in steps.graphs.items() if key in graphs}
    steps.graphs = graphs | {k: graph for k, graph in steps.graphs.items() if k not in graphs}
    return 1 - sum(graph.seconds() for graph in there.values()) / elapsed


def seconds_of(bench: Bench, work: Callable[[], Any]) -> float:
    """Median seconds; on CUDA inside a graph, as the engine runs it."""
    if not bench.on_cuda:
        return median(timed(bench, work) for _ in range(5))
    work()
    bench.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    work = graph.replay
    return median(timed(bench, work) for _ in range(20))


def timed(bench: Bench, work: Callable[[], Any]) -> float:
    bench.wait()
    started = time.perf_counter()
    work()
    bench.wait()
    return time.perf_counter() - started


def memory(bench: Bench) -> None:
    """Keys and values that requests really hold, against what the costs say."""
    for recursions in (1, 3) if bench.tiny else (1, 2, 3, 4):
        name = "vanilla" if recursions == 1 else f"mor-{recursions}"
        with bench.trying(name):
            model = decoder(bench, recursions, torch.float32)
            held, expected = kv_bytes_per_token(model, 96 if bench.tiny else 512)
            bench.figure(f"{name}: bytes per token", held)
            bench.promise(
                f"{name}: over the formula",
                held / expected <= 1.25,
                held / expected,
                "at most 1.25",
            )


def kv_bytes_per_token(model: Transformer, length: int) -> tuple[float, float]:
    """What four requests of this length hold, and the formula for the depths they took."""
    settings = EngineConfig(max_num_seqs=4, max_len=length + 8, prefix_caching=False, compile=False)
    it = Engine(model, config=settings)
    for i in range(4):
        it.add_request(draw(length, seed=i).tolist(), SamplingParams(max_new_tokens=8))
    while any(r.num_read < length - 1 for r in it.requests.values()):
        it.step()
    depths = [d for r in it.requests.values() for d in r.depths]
    kept = [sum(d > r for d in depths) for r in range(model.config.num_recursions)]
    itemsize = model.embedding.weight.dtype.itemsize
    expected = costs.kv_bytes(model.config, len(depths), kept, itemsize)
    return it.kv.used_bytes / len(depths), expected / len(depths)


class Stage(NamedTuple):
    run: Callable[[Bench], None]
    limit_s: int


STAGES = {
    "environment": Stage(environment, 15),
    "capture": Stage(capture, 50),
    "kernel": Stage(kernel, 30),
    "gradients": Stage(gradients, 55),
    "engine": Stage(engine, 40),
    "compiled": Stage(compiled, 65),
    "training": Stage(training, 50),
    "train_time": Stage(train_time, 75),
    "decoding": Stage(decoding, 140),
    "memory": Stage(memory, 20),
}
"""In order; the limits add up to nine minutes. docs/gpu.md has what each is expected to take."""


def run(name: str, device: str, *, tiny: bool) -> None:
    torch.set_num_threads(1 if tiny else min(8, os.cpu_count() or 1))
    torch.manual_seed(0)
    STAGES[name].run(Bench(name, pick_device(device), tiny))  # float32 is exact
