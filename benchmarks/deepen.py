r"""Does a deepened model do what the same adapters cannot do without a loop? Composition in words.

    mor convert SMOLLM2 smol
    python benchmarks/deepen.py smol --out runs/deepen --jobs 2

Trained, for each seed:

    gain              adapters that act in later recursions; who takes them, learns the router
    every token       the same, and every token takes them all
    no loop           adapters in the block's one pass, of no fewer parameters, for as many FLOPs
    no loop, longer   for twice as many

FLOPs are those that were done: of the head only tokens with a target count, and where the source is
left as it is, its prelude's states are kept on the disk and not counted. "gain" is charged as if
every token took every recursion. --train all (or block) trains the source as well, in
every row; recursion 1 is then no longer the source.

The answer is the likeliest of those that there are. Asked are numbers of steps that training did
not ask for (and, to see what was learned, those that it did, in other problems); models with a loop
also with more recursions than they were trained with. The router is compared with random and
confident tokens that go as deep on average, and with an oracle that knows what each depth is worth
to each token, all in the same model. Run it again after an interruption: what is finished is kept.

The same at a size where a run takes minutes, with a source that has learned two steps and may move:

    mor train --preset tiny --num-recursions 1 --num-layers 6 --model.init-std 0.125 \
        --data.path "words:swaps?each=1&cups=3&hops=2&held_out=0" --data.tokenizer bytes \
        --data.document-mask --seq-len 128 --batch-size 16 --optim.lr 4e-3 --steps 1000 \
        --no-calibrate --out runs/small-source
    python benchmarks/deepen.py runs/small-source --out runs/deepen-small --train all --clip 1 \
        --block 2 4 --num-recursions 4 --rank 16 --flops 4e12 --lr 2e-3 --windows 32768 \
        --batch-size 16 --eval-windows 256 --jobs 2

Fixed before the seeds that count: the claim is that "gain", and "every token", answer at least 10
points more of the held-out numbers of steps than "no loop" and than "no loop, longer", as means
over the seeds, with McNemar's p below 0.01 in each; and that the router is no worse than random and
confident choice at its mean depth. Block, recursions and learning rate are chosen on other seeds
(--seeds 1) by how many answers of all steps "every token" has right.
"""

import json
import multiprocessing
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from scipy.stats import binomtest
from torch import Tensor

from mor import checkpoint
from mor.analysis.early_exit import POLICIES
from mor.conversion.convert import convert
from mor.conversion.deepen import Deepening
from mor.costs.flops import (
    Workload,
    backward_flops,
    forward_flops,
    sequence_workload,
    unique_params,
)
from mor.data.config import DataConfig
from mor.data.corpus import Corpus, load_corpus
from mor.data.stream import Batch, TaskData
from mor.files import read_json, write_json
from mor.model.config import ModelConfig, RouterConfig, Trained
from mor.model.loss import IGNORED
from mor.model.other_depths import ForcedRouter, RepeatLastRouter
from mor.model.routers import Router
from mor.model.transformer import Transformer
from mor.run_folder import RunFolder
from mor.statistics import mean_interval
from mor.training.config import TrainConfig
from mor.training.loop import train
from mor.training.optim import OptimConfig
from mor.training.source_cache import SourceCache

LOOPS, ALL, ONCE, LONGER = "gain", "every token", "no loop", "no loop, longer"
ROWS = (LOOPS, ALL, ONCE, LONGER)


@dataclass(frozen=True, kw_only=True)
class Settings:
    source: tyro.conf.Positional[Path]
    """What ``mor convert`` made of the pretrained model."""
    out: Path = Path("runs/deepen")
    task: str = "words:swaps?each=1&cups=3&hops=6&held_out=2"
    block: tuple[int, int] = (26, 28)
    num_recursions: int = 4
    further: int = 2
    """Recursions beyond these that models are asked with as well."""
    rank: int = 32
    flops: float = 1.3e13
    """Of a run."""
    longer: float = 2.0
    """Times as many for the longer one."""
    train: Trained = "added"
    """added: the source is left as it is, and its prelude's states are kept on the disk; block: the
    block's layers are trained, too; all: everything."""
    lr: float = 1.5e-3
    clip: float = 10.0
    """Largest norm of the gradient. The gate counts tenfold, and so does its gradient."""
    seeds: tuple[int, ...] = (11, 12, 13)
    rows: tuple[str, ...] = ROWS
    windows: int = 1536
    """Of the training text."""
    eval_windows: int = 64
    """Of problems of held-out numbers of steps, and half as many of the others."""
    batch_size: int = 2
    seq_len: int = 128
    jobs: int = 1
    """Runs at a time, each with one thread."""


def deepening(settings: Settings, row: str, source: ModelConfig) -> Deepening:
    """For a loop, or for the control: as many parameters as a loop adds, and no fewer."""
    loops = Deepening(
        block=settings.block,
        num_recursions=settings.num_recursions,
        router=RouterConfig(kind="gain" if row == LOOPS else "fixed"),
        kv_strategy="hybrid" if row == LOOPS else "recursion_wise",
        lora_rank=settings.rank,
    )
    if row in (LOOPS, ALL):
        return loops
    from mor.conversion.deepen import deepened_config

    wanted = unique_params(deepened_config(source, replace(loops, router=RouterConfig())))
    once = replace(loops, num_recursions=1, router=RouterConfig(), kv_strategy="recursion_wise")
    while unique_params(deepened_config(source, once)) < wanted:
        once = replace(once, lora_rank=once.lora_rank + 1)
    return once


def flops_per_window(config: ModelConfig, settings: Settings, asked: float) -> float:
    """Of a training step for one window, as it is done at most. asked: targets in a window."""
    length, R = settings.seq_len, config.num_recursions
    whole = sequence_workload(config, length, capacities=(1.0,) * R)
    cached = settings.train == "added"
    kept = config.replace(prelude_layers=0) if cached else config

    def work(depth: int) -> Workload:
        return replace(
            whole, kept=whole.kept[:depth], pairs=whole.pairs[:depth], logits=round(asked)
        )

    found = forward_flops(kept, work(R)) + backward_flops(kept, work(R), settings.train)
    measured = range(1 + cached, R) if config.router.kind == "gain" else ()
    return found + sum(forward_flops(kept, work(depth)) for depth in measured)


def corpus_of(settings: Settings, start: Path) -> Corpus:
    """Training windows of a number that all runs share, and validation windows."""
    tokenizer = checkpoint.load(start).tokenizer
    found = load_corpus(DataConfig(path=settings.task), tokenizer)
    assert isinstance(found.train, TaskData) and isinstance(found.validation, TaskData)
    return Corpus(tokenizer, replace(found.train, count=settings.windows), found.validation)


def run(task: tuple[Settings, str, int]) -> None:
    """Train one row with one seed and write what it answers."""
    settings, row, seed = task
    torch.set_num_threads(1)
    folder = settings.out / row.replace(", ", "-").replace(" ", "-") / f"seed-{seed}"
    if (folder / "result.json").is_file():
        return
    start = settings.out / "starts" / row.partition(",")[0].replace(" ", "-")
    corpus = corpus_of(settings, start)
    config = checkpoint.load(start).config
    few = corpus.train.batch(range(64), settings.seq_len)
    per_window = flops_per_window(config, settings, float((few.targets_BT != IGNORED).sum()) / 64)
    budget = settings.flops * (settings.longer if row == LONGER else 1)
    steps = max(1, round(budget / per_window / settings.batch_size))
    made = TrainConfig(
        init_from=str(start),
        data=DataConfig(path=settings.task, document_mask=True),
        optim=OptimConfig(
            lr=settings.lr,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            warmup=0.05,
            cooldown=0.3,
            clip=settings.clip,
        ),
        out=str(folder / "run"),
        train=settings.train,
        source_cache=str(settings.out / "source") if settings.train == "added" else None,
        steps=steps,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        eval_every=10**9,
        eval_windows=1,
        log_every=10,
        keep=1,
        calibrate=False,
        seed=seed,
        device="cpu",
    )
    console = Console(file=(settings.out / f"{folder.parent.name}-{seed}.log").open("a"))
    done = train(made, resume=(folder / "run").exists(), corpus=corpus, console=console, label=row)
    if not done.finished:
        raise SystemExit("interrupted; run it again to go on")
    model = checkpoint.load(done.path).model.requires_grad_(False)
    source = None
    if settings.train == "added":
        source = SourceCache(settings.out / "source", model, settings.seq_len)
    assert isinstance(corpus.train, TaskData)
    unseen = replace(corpus.train, first=1 << 30, count=settings.eval_windows // 2)
    progress = [m for m in RunFolder(folder / "run").read_metrics() if "loss" in m]
    found = {
        "row": row,
        "seed": seed,
        "steps": steps,
        "tokens": done.state.tokens,
        "flops_at_most": per_window * settings.batch_size * steps,
        "train_s": done.state.train_s,
        "trained_parameters": unique_params(config)
        - unique_params(checkpoint.load(settings.source).config),
        "lora_rank": config.lora_rank,
        "train_share_per_recursion": np.mean(
            [m.get("share_per_recursion", [1.0]) for m in progress], axis=0
        ).tolist(),
        "answers": answers(settings, model, corpus.validation, source),
        "trained_steps": answers(settings, model, unseen, source, only_own=True),
    }
    write_json(folder / "result.json", found)


class Asked(NamedTuple):
    """What a model says where it is asked: whether it is right, the loss, how deep those tokens
    went, the largest probability of any token, and the router's logit after the first recursion, if
    it has one, (N,) each. depths: of all tokens, for each batch."""

    right: Tensor
    nll: Tensor
    depth: Tensor
    confidence: Tensor
    urge: Tensor | None
    depths: list[Tensor]

    @property
    def mean_depth(self) -> float:
        return float(torch.cat(self.depths).double().mean())


@torch.inference_mode()
def ask(
    model: Transformer,
    batches: list[tuple[Batch, Tensor | None]],
    choices: Tensor,
    routers: list[Router | None],
    **settings: Any,
) -> Asked:
    """choices: the tokens that answers may be. routers: for each batch, None for the model's."""
    found: list[list[Tensor]] = []
    depths: list[Tensor] = []
    for (batch, entered_BTD), router in zip(batches, routers, strict=True):
        with last_states(model) as states:
            routing = model(
                batch.tokens_BT,
                documents_BT=batch.documents_BT,
                entered_BTD=entered_BTD,
                router=router,
                logits="none",
                **settings,
            ).routing
        at = (batch.targets_BT.flatten() != IGNORED).nonzero().squeeze(1)
        logits = model.predict(states[-1][at]).float()
        target = batch.targets_BT.flatten()[at]
        logp = logits.log_softmax(-1)
        scores = routing.steps[1].decision.logit if len(routing.steps) > 1 else None
        found.append(
            [
                choices[logits[:, choices].argmax(-1)] == target,
                -logp.gather(1, target[:, None])[:, 0],
                routing.depth[at],
                logp.amax(-1).exp(),
                *([scores[at]] if scores is not None else []),
            ]
        )
        depths.append(routing.depth)
    right, nll, depth, confidence, *urge = (torch.cat(x) for x in zip(*found, strict=True))
    return Asked(right, nll, depth, confidence, urge[0] if urge else None, depths)


@contextmanager
def last_states(model: Transformer) -> Iterator[list[Tensor]]:
    """What comes out of the last layer."""
    states: list[Tensor] = []
    last = model.coda[-1] if len(model.coda) else model.recursions
    hook = last.register_forward_hook(
        lambda _, __, out: states.append(out if isinstance(out, Tensor) else out[0])
    )
    try:
        yield states
    finally:
        hook.remove()


def answers(
    settings: Settings,
    model: Transformer,
    data: Any,
    source: SourceCache | None,
    *,
    only_own: bool = False,
) -> dict[str, Any]:
    """Of a trained model, at its own depth and others, and by others' choice of who goes deeper."""
    indices = data.spread(settings.seq_len, settings.eval_windows)
    parts = [indices[i : i + 16] for i in range(0, len(indices), 16)]
    batches, hops, windows = [], [], []
    for part in parts:
        batch = data.batch(part, settings.seq_len, documents=True)
        batches.append((batch, source.of(batch).entered_BTD if source else None))
        at_BT = batch.targets_BT != IGNORED
        hops.append(data.problems(part, settings.seq_len).hops_BT[at_BT])
        assert batch.documents_BT is not None
        windows.append(batch.documents_BT[at_BT] + part[0] * settings.seq_len)
    task = data.task
    choices = torch.tensor([task.tokenizer.encode(a)[task.told_apart] for a in task.task.answers()])
    own, R = [None] * len(batches), model.config.num_recursions
    asked = {"own": ask(model, batches, choices, own)}
    for depth in () if only_own else range(1, R):
        asked[f"at most {depth}"] = ask(model, batches, choices, own, max_depth=depth)
    for depth in () if only_own or R == 1 else range(R + 1, R + 1 + settings.further):
        more = [RepeatLastRouter(model.router, depth)] * len(batches)
        asked[f"at most {depth}"] = ask(model, batches, choices, more)
    if model.config.router.kind == "gain" and not only_own:
        asked |= policies(model, batches, choices, asked["at most 1"], asked["own"])
    auroc = None
    if asked["own"].urge is not None and not only_own:
        gain = asked["at most 1"].nll - asked["at most 2"].nll
        auroc = area(asked["own"].urge, gain > 0)
    return {
        "hops": torch.cat(hops).tolist(),
        "problem": torch.cat(windows).tolist(),
        "auroc_of_gain": auroc,
        "by": {
            name: {
                "right": each.right.int().tolist(),
                "nll": each.nll.mean().item(),
                "mean_depth": each.mean_depth,
                "mean_depth_where_asked": each.depth.double().mean().item(),
            }
            for name, each in asked.items()
        },
    }


def policies(
    model: Transformer,
    batches: list[tuple[Batch, Tensor | None]],
    choices: Tensor,
    source: Asked,
    own: Asked,
) -> dict[str, Asked]:
    """Others choose who of the tokens that are asked goes deeper, to the mean depth that the router
    takes there; the rest goes as deep as it says. Each is a real forward with these depths."""
    R, forced = model.config.num_recursions, [source]
    counts = [int((batch.targets_BT != IGNORED).sum()) for batch, _ in batches]
    table_R = torch.arange(R)[:, None]
    for depth in range(2, R + 1):
        routers: list[Router | None] = [
            ForcedRouter(model.router, (table_R < depth).expand(-1, batch.tokens_BT.numel()))
            for batch, _ in batches
        ]
        forced.append(ask(model, batches, choices, routers))
    nll_MR = torch.stack([each.nll for each in forced], 1).double()
    confidence_MR = torch.stack([each.confidence for each in forced], 1).double()
    found = {f"all to {d}": each for d, each in enumerate(forced, start=1)}
    mean = float(own.depth.double().mean())
    for name, policy in POLICIES.items():
        depths = policy(nll_MR, confidence_MR, mean).split(counts)
        routers = []
        for (batch, _), usual_M, chosen in zip(batches, own.depths, depths, strict=True):
            depth_M = usual_M.clone()
            depth_M[batch.targets_BT.flatten() != IGNORED] = chosen
            routers.append(ForcedRouter(model.router, table_R < depth_M))
        found[name] = ask(model, batches, choices, routers)
    return found


def area(score: Tensor, wanted: Tensor) -> float:
    """Under the curve of hits over false alarms; ties count half."""
    from scipy.stats import rankdata

    rank, hits = rankdata(score.double().numpy()), wanted.numpy()
    positive, negative = int(hits.sum()), int((~hits).sum())
    if not positive * negative:
        return float("nan")
    return float(rank[hits].sum() - positive * (positive + 1) / 2) / (positive * negative)


def per_problem(answers: dict[str, Any], name: str) -> dict[int, tuple[int, bool]]:
    """One answer of each problem, (hops, right): problems take turns in which step is asked, so
    that answers are independent."""
    found: dict[int, list[tuple[int, bool]]] = {}
    for problem, hops, right in zip(
        answers["problem"], answers["hops"], answers["by"][name]["right"], strict=True
    ):
        if hops:
            found.setdefault(problem, []).append((hops, bool(right)))
    return {p: each[i % len(each)] for i, (p, each) in enumerate(sorted(found.items()))}


def compare(first: dict[str, Any], second: dict[str, Any], name: str, other: str) -> dict[str, Any]:
    """Accuracy of the first minus the second's, in points, over the same problems; the p-value is
    McNemar's, exact."""
    a, b = per_problem(first, name), per_problem(second, other)
    assert a.keys() == b.keys()
    wins = sum(a[p][1] and not b[p][1] for p in a)
    losses = sum(b[p][1] and not a[p][1] for p in a)
    return {
        "problems": len(a),
        "points": 100 * (wins - losses) / len(a),
        "p": binomtest(wins, wins + losses).pvalue if wins + losses else 1.0,
    }


def summary(settings: Settings) -> dict[str, Any]:
    """Of all runs that are finished."""
    found = [read_json(path) for path in sorted(settings.out.glob("*/seed-*/result.json"))]
    table, comparisons = [], []
    for one in found:
        for steps in ("held out", "trained"):
            asked = one["answers" if steps == "held out" else "trained_steps"]
            hops = np.array(asked["hops"])
            for name, by in asked["by"].items():
                right = np.array(by["right"])
                by_hops = {int(h): float(right[hops == h].mean()) for h in sorted({*hops} - {0})}
                table.append(
                    {key: one[key] for key in ("row", "seed", "steps", "tokens", "flops_at_most")}
                    | {"asked": steps, "by": name, "right": float(right[hops > 0].mean())}
                    | {"right_by_hops": by_hops, "train_s": one["train_s"]}
                    | {key: by[key] for key in ("nll", "mean_depth", "mean_depth_where_asked")}
                    | {"auroc_of_gain": asked["auroc_of_gain"]}
                )
    by_seed = {(one["row"], one["seed"]): one["answers"] for one in found}
    pairs = [((a, "own"), (b, "own")) for a, b in combinations(ROWS, 2)]
    pairs += [((LOOPS, "own"), (LOOPS, policy)) for policy in POLICIES]
    deepest = f"at most {settings.num_recursions + settings.further}"
    pairs += [((row, deepest), (once, "own")) for row in (LOOPS, ALL) for once in (ONCE, LONGER)]
    for (row, name), (other, by) in pairs:
        seeds = [s for s in settings.seeds if (row, s) in by_seed and (other, s) in by_seed]
        each = [compare(by_seed[row, s], by_seed[other, s], name, by) for s in seeds]
        over = mean_interval([one["points"] for one in each])
        if over is not None:
            comparisons.append(
                {"first": [row, name], "second": [other, by], "seeds": seeds, "each": each}
                | {"mean_points": over.mean, "low": over.low, "high": over.high}
            )
    return {"table": table, "comparisons": comparisons}


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    source = checkpoint.load(settings.source).config
    for row in ROWS[:3]:
        start = settings.out / "starts" / row.replace(" ", "-")
        if not start.exists():
            convert(str(settings.source), start, deepening=deepening(settings, row, source))
    tasks = [(settings, row, seed) for seed in settings.seeds for row in settings.rows]
    if settings.jobs == 1:
        for task in tasks:
            run(task)
    else:
        with multiprocessing.get_context("spawn").Pool(settings.jobs) as pool:
            for _ in pool.imap_unordered(run, tasks):
                pass
    machine = dict(torch=torch.__version__, python=platform.python_version(), jobs=settings.jobs)
    found = summary(settings) | {"machine": machine}
    for line in found["table"]:
        by_hops = " ".join(f"{hops}: {right:.2f}" for hops, right in line["right_by_hops"].items())
        print(
            f"{line['row']:16} seed {line['seed']:3} {line['asked']:8} {line['by']:11} right "
            f"{line['right']:.3f} ({by_hops}) nll {line['nll']:.3f} mean depth "
            f"{line['mean_depth']:.2f} tokens {line['tokens']:,}"
        )
    for line in found["comparisons"]:
        print(
            f"{', '.join(line['first'])} - {', '.join(line['second'])}: {line['mean_points']:+.1f} "
            f"points, p {', '.join(format(each['p'], '.1g') for each in line['each'])}"
        )
    write_json(settings.out / "summary.json", found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
