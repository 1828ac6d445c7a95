"""What self-speculation could give: how often the prediction after recursion 1 is the adaptive one,
what the parts of a step take, and what follows from both.

    python benchmarks/self_speculation.py CHECKPOINT TEXT.jsonl --kind-field source

Acceptance, of tokens of held-out text: each alone stops after recursion 1, those before it are as
the router left them, which is what a first draft sees. Greedy: the likeliest token is the same.
Sampled: the sum over the vocabulary of the smaller of both probabilities, which is how often
rejection sampling takes a draft. A token that stops after recursion 1 anyway is accepted for sure.

Times are of one new token behind a context, and of several rows of a pass, medians. A cycle of
draft-then-verify with n rows: n - 1 drafts (prelude, block, coda, head), prelude and block of one
more row, the deeper passes, then coda and head over n rows. Entries of the prelude and of recursion
1 are kept; it gives (1 - a^n) / (1 - a) tokens at acceptance a (each draft as good as the first,
which is too good). With a short draft vocabulary, drafts pay that share of the head, and those
outside it are lost.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import tyro
from torch import Tensor

from mor import checkpoint
from mor.analysis.branches import exits
from mor.cli.depth import parse_depth
from mor.data.sources import read_documents
from mor.device import pick_device
from mor.model.attention import attention
from mor.model.budget import router_for
from mor.model.kv_cache import KVCache
from mor.model.transformer import Transformer, rotary_angles
from mor.statistics import group_means


@dataclass(frozen=True, kw_only=True)
class Settings:
    checkpoint: tyro.conf.Positional[Path]
    text: tyro.conf.Positional[Path]
    """.jsonl (also .zst or .gz) of held-out documents."""
    kind_field: str | None = None
    """Field that says what kind of text a document is, for a row each."""
    depth: str | None = None
    """Mean depth of the adaptive model, such as 1.3 (a calibrated checkpoint) or full; default: its
    own rule."""
    windows: int = 32
    """Documents, as many of each kind."""
    seq_len: int = 256
    temperature: float = 1.0
    draft_vocab: int = 8192
    """Tokens that a short draft head knows: those with the lowest ids."""
    context: int = 256
    """Tokens before the one that is timed."""
    rows: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    """Of a verification: drafts and the token before them."""
    rounds: int = 9
    threads: int = 1


@dataclass(frozen=True)
class Seen:
    """Of each predicted token: acceptance, whether the router sends it deeper, whether the draft is
    in the short vocabulary, its place, its kind and document."""

    greedy: list[float]
    sampled: list[float]
    deeper: list[bool]
    is_short: list[bool]
    place: list[int]
    kind: list[str]
    window: list[int]


@torch.inference_mode()
def acceptance(model: Transformer, windows: list[tuple[str, list[int]]], settings: Any) -> Seen:
    found = Seen([], [], [], [], [], [], [])
    depth = None
    if settings.depth is not None:
        depth = parse_depth(settings.depth, model.config.num_recursions)
    for number, (kind, ids) in enumerate(windows):
        router = router_for(model, depth)
        cache = KVCache(model.config, 1, num_recursions=router.num_recursions)
        output = model(torch.tensor([ids]), cache=cache, router=router)
        taken_RT = output.routing.taken_RM
        start = 0
        for draft_MV in exits(model, ids, taken_RT, 1, cache, router=router):
            some = slice(start, start + len(draft_MV))
            final_MV, start = output.logits_BTV[0, some], some.stop
            p, q = (
                (logits.float() / settings.temperature).softmax(-1)
                for logits in (final_MV, draft_MV)
            )
            likeliest = draft_MV.argmax(-1)
            found.greedy.extend((final_MV.argmax(-1) == likeliest).double().tolist())
            found.sampled.extend(torch.minimum(p, q).sum(-1).double().tolist())
            found.is_short.extend((likeliest < settings.draft_vocab).tolist())
        found.deeper.extend((taken_RT.sum(0) > 1).tolist())
        found.place.extend(range(len(ids)))
        found.kind.extend([kind] * len(ids))
        found.window.extend([number] * len(ids))
    return found


def table(seen: Seen) -> list[dict[str, Any]]:
    """Mean acceptance with 95% intervals, documents as what is independent."""
    start = [max(first for first in (0, 4, 16, 64, 256, 1024) if first <= t) for t in seen.place]
    groups = {
        "all": ["all"] * len(seen.kind),
        "kind": seen.kind,
        "position": [f"from {first}" for first in start],
        "depth": ["goes deeper" if deeper else "stops after 1" for deeper in seen.deeper],
    }
    rows = []
    for by, names in groups.items():
        greedy = group_means(seen.greedy, names, seen.window)
        sampled = group_means(seen.sampled, names, seen.window)
        for g, s in zip(greedy, sampled, strict=True):
            rows.append(
                {"by": by, "group": g.group, "tokens": g.count}
                | {"greedy": g.mean, "greedy_low": g.low, "greedy_high": g.high}
                | {"sampled": s.mean, "sampled_low": s.low, "sampled_high": s.high}
            )
    return rows


@torch.inference_mode()
def part_seconds(model: Transformer, settings: Any) -> dict[str, list[float]]:
    """Seconds of prelude, block, coda and head for each number of rows behind the context."""
    config, size = model.config, settings.context
    generator = torch.Generator().manual_seed(0)
    entries = (2, size, config.num_kv_heads, config.head_dim)
    k_SGH, v_SGH = torch.randn(entries, generator=generator)

    class Behind:
        """A pass that attends to the context and itself; entries are new each time."""

        writes = True

        def write(self, layer: int, k: Tensor, v: Tensor) -> None:
            self.k, self.v = (
                torch.cat([past[:size], new]) for past, new in ((k_SGH, k), (v_SGH, v))
            )

        def attend(self, layer: int, q_MNH: Tensor) -> Tensor:
            rows = len(q_MNH)
            seen = torch.ones(rows, size + rows, dtype=torch.bool).tril(size)[None]
            return attention(q_MNH[None], self.k[None], self.v[None], seen)[0]

    def layers(blocks: Any, x: Tensor) -> None:
        place = torch.arange(size, size + len(x))
        angles = rotary_angles(place, config.head_dim, config.rope_theta)
        for layer, block in enumerate(blocks):
            x = block(x, angles, Behind(), layer)

    parts: dict[str, Callable[[Tensor], object]] = {
        "prelude": lambda x: layers(model.prelude, x),
        "block": lambda x: layers(model.recursions.shared_blocks, x),
        "coda": lambda x: layers(model.coda, x),
        "head": model.predict,
    }
    # Of one thread its own seconds count, whatever else the machine does.
    clock = time.process_time if settings.threads == 1 else time.perf_counter
    samples = {name: [[] for _ in settings.rows] for name in parts}
    for _ in range(settings.rounds):  # all take turns, so that other work disturbs all alike
        for i, rows in enumerate(settings.rows):
            x = torch.randn(rows, config.dim, generator=generator)
            for name, part in parts.items():
                started = clock()
                part(x)
                samples[name][i].append(clock() - started)
    return {name: [median(each) for each in found] for name, found in samples.items()}


def gains(
    seconds: dict[str, list[float]],
    rows: tuple[int, ...],
    recursions: int,
    share_deeper: float,
    accepted: float,
    head_share: float = 1.0,
) -> dict[int, dict[str, float]]:
    """Tokens per second of draft-then-verify with each number of rows, over one token at a time
    with every recursion, and over the adaptive model, which takes later recursions for a share of
    tokens. Those passes run if any row asks for them."""
    one = {name: found[rows.index(1)] for name, found in seconds.items()}
    first = one["prelude"] + one["block"]
    full = first + (recursions - 1) * one["block"] + one["coda"] + one["head"]
    adaptive = full - (1 - share_deeper) * (recursions - 1) * one["block"]
    found = {}
    for i, n in enumerate(rows):
        if n == 1:
            continue
        drafts = (n - 1) * (first + one["coda"] + head_share * one["head"]) + first
        some_go = 1 - (1 - share_deeper) ** n
        verify = seconds["coda"][i] + seconds["head"][i]
        deeper = (recursions - 1) * seconds["block"][i]
        given = n if accepted == 1 else (1 - accepted**n) / (1 - accepted)
        found[n] = {
            "over_full": full * given / (drafts + deeper + verify),
            "over_adaptive": adaptive * given / (drafts + some_go * deeper + verify),
        }
    return found


def recommendation(found: dict[str, dict[int, dict[str, float]]], least: float = 1.2) -> str:
    kind, n, gain = max(
        (
            (kind, n, row["over_adaptive"])
            for kind, rows in found.items()
            for n, row in rows.items()
        ),
        key=lambda one: one[2],
    )
    if gain < least:
        return (
            f"not worth building for this model: at best {gain:.2f} times the adaptive model's "
            f"tokens per second ({kind}, {n} rows); {least} is what it should give"
        )
    return f"worth building: {gain:.2f} times the adaptive model ({kind}, {n} rows)"


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(settings.threads)
    loaded = checkpoint.load(settings.checkpoint)
    model = loaded.model.requires_grad_(False).to(pick_device("cpu"))
    windows = documents(settings, loaded.tokenizer)
    seen = acceptance(model, windows, settings)
    rows = table(seen)
    share = fmean(seen.deeper)
    seconds = part_seconds(model, settings)
    recursions = model.config.num_recursions
    short = fmean(seen.is_short)
    greedy, sampled = fmean(seen.greedy), fmean(seen.sampled)
    in_short = fmean(g * known for g, known in zip(seen.greedy, seen.is_short, strict=True))
    head_share = settings.draft_vocab / model.config.vocab_size
    common = (seconds, settings.rows, recursions, share)
    found = {
        "greedy": gains(*common, greedy),
        "sampled": gains(*common, sampled),
        "greedy, short draft head": gains(*common, in_short, head_share),
    }
    result = {
        "checkpoint": str(settings.checkpoint),
        "depth": settings.depth,
        "documents": len(windows),
        "acceptance": rows,
        "share_deeper": share,
        "drafts_in_short_vocabulary": short,
        "rows": settings.rows,
        "part_seconds": seconds,
        "gains": found,
        "recommendation": recommendation(found),
        "machine": dict(threads=settings.threads, torch=torch.__version__),
        "python": platform.python_version(),
    }
    print(f"{'':34} tokens  greedy            sampled")
    for row in rows:
        print(
            f"{row['by']:9} {row['group']:24} {row['tokens']:6}  {shown(row, 'greedy')}  "
            f"{shown(row, 'sampled')}"
        )
    for name, each in seconds.items():
        print(f"{name:8} {' '.join(f'{1e3 * s:7.2f}' for s in each)} ms at {settings.rows} rows")
    for kind, by_rows in found.items():
        for n, gain in by_rows.items():
            print(
                f"{kind}, {n} rows: {gain['over_full']:.2f} over full depth, "
                f"{gain['over_adaptive']:.2f} over adaptive"
            )
    print(result["recommendation"])
    print(json.dumps(result))


def shown(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.3f}" + (f" [{low:.3f} {high:.3f}]" if low is not None else " " * 14)


def documents(settings: Any, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """The beginnings of documents, as many of each kind."""
    by_kind: dict[str, list[list[int]]] = {}
    field = settings.kind_field
    kinds = {d.name: d.text for d in read_documents(settings.text, field)} if field else {}
    for document in read_documents(settings.text):
        kind = by_kind.setdefault(kinds.get(document.name, "text"), [])
        if len(kind) < settings.windows:
            ids = tokenizer.encode(document.text[: 8 * settings.seq_len])[: settings.seq_len]
            kind.extend([ids] if len(ids) == settings.seq_len else [])
    each = max(1, settings.windows // max(1, len(by_kind)))
    return [(kind, ids) for kind, found in by_kind.items() for ids in found[:each]]


if __name__ == "__main__":
    main()
