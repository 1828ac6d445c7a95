"""What routing does over a corpus: one function for each question, each answered in tidy rows.

Windows are read with threshold selection, which is causal; only :func:`agreement` also reads them
with the top-k selection of training, to compare. :func:`read` gathers what several functions need.

B rows · T tokens of a window · M packed tokens · R recursions · A rows that hold tokens · V vocab
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mor.analysis.branches import exits
from mor.analysis.classes import LEAST, depth_by_class, kinds
from mor.data.problems import Task
from mor.data.stream import TokenData, Windows
from mor.data.tokenizer import Tokenizer
from mor.evaluation.finite import require_finite, values_of
from mor.evaluation.nll import evaluate, window_length
from mor.model.checks import check_finite
from mor.model.kv_cache import EMPTY, KVCache
from mor.model.loss import IGNORED
from mor.model.other_depths import RepeatLastRouter
from mor.model.routing import Routing
from mor.model.transformer import Transformer
from mor.statistics import group_means

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Reading:
    """Windows that a model has read. tokens_BT and targets_BT: the text; routings: one per window,
    with threshold selection and with the states that tokens went through."""

    model: Transformer
    tokens_BT: Tensor
    targets_BT: Tensor
    routings: Sequence[Routing]
    caches: Sequence[KVCache]

    @property
    def depth_BT(self) -> Tensor:
        return torch.cat([r.depth_BT for r in self.routings])


@torch.no_grad()
def read(model: Transformer, data: Windows, *, seq_len: int, max_windows: int = 32) -> Reading:
    """Read up to ``max_windows`` windows of ``seq_len`` tokens, spread evenly over the data.

    Whole windows only: positions are compared between them. Documents in a window are not masked
    from each other. Raises ValueError if a window does not fit the model or the data, and if the
    model gives NaN or infinity.
    """
    weight = model.embedding.weight
    window_length(model, seq_len)
    batch = data.batch(data.spread(seq_len, max_windows), seq_len)
    tokens_BT, targets_BT = batch.tokens_BT.to(weight.device), batch.targets_BT.to(weight.device)
    routings: list[Routing] = []
    caches: list[KVCache] = []
    for tokens_1T in tokens_BT.split(1):
        caches.append(KVCache(model.config, 1, device=weight.device, dtype=weight.dtype))
        output = model(tokens_1T, cache=caches[-1], logits="last", keep_states=True)
        require_finite(model, values_of(output), f"in window {len(routings) + 1} of those read")
        routings.append(output.routing)
    return Reading(model, tokens_BT, targets_BT, routings, caches)


def depth_histogram(reading: Reading) -> Rows:
    """Tokens and their share by the number of recursions they took."""
    counts = torch.bincount(
        reading.depth_BT.flatten(), minlength=reading.model.config.num_recursions + 1
    ).tolist()
    total = sum(counts)
    least = reading.model.config.least_depth
    return [
        dict(depth=d, tokens=n, share=n / total) for d, n in enumerate(counts) if d >= least or n
    ]


def dead_tokens(reading: Reading) -> Rows:
    """For each recursion: the share of positions at which no window took it, and of the distinct
    tokens that never took it although they were read at least ``often`` = 5 times."""
    often, rows = 5, []
    seen = torch.bincount(reading.tokens_BT.flatten())
    common = seen >= often
    for r in range(reading.model.config.num_recursions):
        selected_BT = torch.cat([routing.selected_BT(r) for routing in reading.routings])
        took = torch.bincount(reading.tokens_BT[selected_BT], minlength=len(seen))
        dead_types = (took == 0)[common].float().mean()
        rows.append(
            dict(
                recursion=r + 1,
                dead_positions=1 - float(selected_BT.any(0).float().mean()),
                dead_types=float(dead_types) if common.any() else None,
                windows=len(selected_BT),
                types=int(common.sum()),
            )
        )
    return rows


def depth_predictors(reading: Reading) -> Rows:
    """How much of the depth a lookup table would know: the share of its variance in the second half
    of the windows that the mean depth of equal tokens, previous tokens or positions in the first
    half explains (R², may be < 0).

    Near 1 for the token alone: the router decides by what token it is. Empty for fewer than two
    windows and for equal depths.
    """
    tokens_BT, depth_BT = reading.tokens_BT[:, 1:], reading.depth_BT[:, 1:].double()
    half = len(tokens_BT) // 2
    if not half or len(depth_BT[half:].unique()) < 2:
        return []
    place_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    looked_up = {
        "token": tokens_BT,
        "previous token": reading.tokens_BT[:, :-1],
        "position": place_BT,
    }
    rows = []
    for name, key_BT in looked_up.items():
        known, wanted = depth_BT[:half].flatten(), depth_BT[half:].flatten()
        count = torch.bincount(key_BT[:half].flatten(), minlength=int(key_BT.max()) + 1)
        sums = torch.bincount(key_BT[:half].flatten(), known, minlength=len(count))
        mean = torch.where(count > 0, sums / count.clamp(min=1), known.mean())
        left = (wanted - mean[key_BT[half:].flatten()]).square().sum() / (
            wanted - known.mean()
        ).square().sum()
        rows.append(dict(predictor=name, explained=1 - float(left), tokens=len(wanted)))
    return rows


@torch.no_grad()
def agreement(reading: Reading) -> Rows:
    """Threshold against top-k, the non-causal selection of training, for each recursion that
    selects.

    same_decision: share of top-k's candidates on which the threshold, seeing the same state,
    decides the same.
    same_depth: share of tokens that end at the same depth when each selection reads the text by
    itself. Empty for routers without top-k.
    """
    rows: Rows = []
    if not (reading.model.router.has_topk and reading.model.router.is_learned):
        return rows
    top = [
        reading.model(t, selection="topk", logits="none").routing
        for t in reading.tokens_BT.split(1)
    ]
    same_depth = float((torch.cat([r.depth_BT for r in top]) == reading.depth_BT).float().mean())
    for r, capacity in enumerate(reading.model.config.capacities):
        if capacity == 1:
            continue
        steps = [routing.steps[r] for routing in top]
        kept = torch.cat([step.chosen for step in steps])
        causal = [step.decision.takes for step in steps]
        decided = torch.cat([takes for takes in causal if takes is not None])
        rows.append(
            dict(
                recursion=r + 1,
                capacity=capacity,
                candidates=len(kept),
                share_topk_non_causal=float(kept.float().mean()),
                share_threshold=float(decided.float().mean()),
                same_decision=float((kept == decided).float().mean()),
                same_depth=same_depth,
            )
        )
    return rows


def score_histogram(reading: Reading, bins: int = 20) -> Rows:
    """How far router scores are from being two-valued: counts by recursion, bin and decision.

    Expert-choice: sigmoid of the logit that the threshold looks at, over the candidates of each
    recursion that selects; recursions without candidates are left out. Token-choice: each depth's
    share of the scores. Empty for routers that score nothing.
    """
    router, rows = reading.model.router, []
    for r, capacity in enumerate(reading.model.config.capacities):
        scores, chosen = [], []
        for routing in reading.routings:
            score, depth = router.shown_score(routing, r), router.chosen_depth(routing.memory)
            if score is None or (depth is None and capacity == 1):
                continue
            chosen_here = routing.selected(r) if depth is None else depth == r + 1
            scores.append(score[~score.isnan()])
            chosen.append(chosen_here[~score.isnan()])
        if not sum(map(len, scores)):  # no token got this far
            continue
        all_scores, all_chosen = torch.cat(scores), torch.cat(chosen)
        place = (all_scores * bins).long().clamp(max=bins - 1)
        for taken_, mask in ((True, all_chosen), (False, ~all_chosen)):
            for b, n in enumerate(torch.bincount(place[mask], minlength=bins).tolist()):
                rows.append(
                    dict(recursion=r + 1, taken=taken_, low=b / bins, high=(b + 1) / bins, tokens=n)
                )
    return rows


def separation(histogram: Rows, margin: float = 0.1) -> Rows:
    """Share of scores within ``margin`` of 0 or 1 per recursion; near 1: decisions are binary."""
    rows = []
    for recursion in sorted({row["recursion"] for row in histogram}):
        own = [row for row in histogram if row["recursion"] == recursion]
        total = sum(row["tokens"] for row in own)
        low = sum(row["tokens"] for row in own if row["high"] <= margin + 1e-9)
        high = sum(row["tokens"] for row in own if row["low"] >= 1 - margin - 1e-9)
        rows.append(
            dict(
                recursion=recursion,
                scored=total,
                near_0=low / total,
                near_1=high / total,
                binary=(low + high) / total,
            )
        )
    return rows


def drift(reading: Reading) -> Rows:
    """How states move: for every two stages (0 is before the first pass) the mean cosine and the
    length of the difference over the length of the earlier state, over the tokens that the later
    pass changed."""
    states = [routing.states for routing in reading.routings]
    rows, stages = [], range(len(states[0]))
    for a, b in combinations(stages, 2):
        earlier, later = (torch.cat([s[i] for s in states]).float() for i in (a, b))
        before = torch.cat([s[b - 1] for s in states])
        moved = (torch.cat([s[b] for s in states]) != before).any(1)
        if not moved.any():
            continue
        x, y = earlier[moved], later[moved]
        cosine = torch.cosine_similarity(x, y, dim=1)
        change = (y - x).norm(dim=1) / x.norm(dim=1)
        rows.append(
            dict(
                earlier=a,
                later=b,
                tokens=len(x),
                cosine=float(cosine.mean()),
                cosine_sd=float(cosine.std(correction=0)),
                relative_change=float(change.mean()),
            )
        )
    return rows


def kv_similarity(reading: Reading) -> Rows:
    """Mean cosine between the keys, and the values, that the same token has at two recursions, by
    layer.

    Keys are compared as cached, rotated for the same position. Empty where recursions share their
    entries.
    """
    sums: dict[tuple[int, int, int], list[float]] = {}
    for cache in reading.caches:
        for a, b in combinations(range(1, cache.num_recursions + 1), 2):
            if not cache.streams[b].k:
                continue
            in_a, in_b = _common(cache, a, b)
            for layer in range(len(cache.streams[a].k)):
                total = sums.setdefault((layer, a, b), [0.0, 0.0, 0])
                for i, kind in enumerate(("k", "v")):
                    x, y = (
                        getattr(cache.streams[s], kind)[layer][0, at].float()
                        for s, at in ((a, in_a), (b, in_b))
                    )
                    total[i] += float(torch.cosine_similarity(x, y, dim=-1).mean(-1).sum())
                total[2] += len(in_a)
    return [
        dict(layer=layer, earlier=a, later=b, tokens=int(n), cosine_keys=k / n, cosine_values=v / n)
        for (layer, a, b), (k, v, n) in sorted(sums.items())
        if n
    ]


def _common(cache: KVCache, a: int, b: int) -> tuple[Tensor, Tensor]:
    """Slots in streams a and b of the tokens that are in both."""
    position_a, position_b = (cache.positions(s, None)[0] for s in (a, b))
    equal_AB = (position_a[:, None] == position_b) & (position_b != EMPTY)
    in_a, in_b = equal_AB.nonzero(as_tuple=True)
    return in_a, in_b


def depth_scaling(
    model: Transformer,
    data: Windows,
    *,
    further: int = 2,
    extrapolate: bool = True,
    **settings: Any,
) -> Rows:
    """Causal NLL with the depth capped at 1..R, then with ``further`` recursions more than were
    trained.

    Further recursions decide and gate as the last trained one
    (:class:`~mor.model.other_depths.RepeatLastRouter`) and keep keys and values of their own; they
    are an extrapolation and labelled so. Settings as in ``evaluate``.
    """
    trained, rows = model.config.num_recursions, []
    deepest = trained + (further if extrapolate and trained > 1 else 0)
    for cap in range(1, deepest + 1):
        router = model.router if cap <= trained else RepeatLastRouter(model.router, cap)
        found = evaluate(model, data, max_depth=cap, router=router, **settings)
        rows.append(
            dict(
                max_depth=cap,
                extrapolated=cap > trained,
                nll=found.nll,
                bits_per_byte=found.bits_per_byte,
                mean_depth=found.mean_depth,
                tokens=found.tokens,
            )
        )
    return rows


def depth_by_token_class(
    reading: Reading,
    tokenizer: Tokenizer,
    counts: dict[int, int] | None = None,
    task: Task | None = None,
) -> Rows:
    """Mean depth by kind, position and frequency; 95% intervals, for which a window is one
    observation. task: the one that the text belongs to, if any."""
    tokens, kind = reading.tokens_BT.tolist(), []
    for ids in tokens:
        kind += kinds(tokenizer, ids, tokenizer.pieces(ids), task)
    flat = [i for ids in tokens for i in ids]
    counts = counts or Counter(flat)
    found = depth_by_class(
        reading.depth_BT.flatten().tolist(),
        kind=kind,
        position=[t for ids in tokens for t in range(len(ids))],
        count=[counts.get(i, 0) for i in flat],
        blocks=[w for w, ids in enumerate(tokens) for _ in ids],
    )
    return [dict(by=by) | asdict(group) for by, groups in found.items() for group in groups]


def counterfactual_gains(reading: Reading) -> Rows:
    """Mean change of the target's log-probability, in nats, with one recursion fewer and one more
    for that token alone, by the depth it took; 95% intervals, for which a window is one
    observation. Tokens without a target do not count."""
    known: dict[str, list[tuple[float, str, int]]] = {"fewer": [], "more": []}
    for w, routing in enumerate(reading.routings):
        logp = _exit_logprobs(reading, w, routing)
        depths, asked = routing.depth_BT[0], reading.targets_BT[w] != IGNORED
        for name, step in (("fewer", -1), ("more", 1)):
            for t in asked.nonzero()[:, 0].tolist():
                depth = int(depths[t])
                if depth in logp and depth + step in logp:
                    change = float(logp[depth + step][t] - logp[depth][t])
                    known[name].append((change, str(depth), w))
    rows: Rows = []
    for name, found in known.items():
        for group in sorted(
            group_means(*zip(*found, strict=True), at_least=LEAST) if found else [],
            key=lambda g: int(g.group),
        ):
            better = np.mean([change > 0 for change, depth, _ in found if depth == group.group])
            means = {k: v for k, v in asdict(group).items() if k != "group"}
            rows.append(
                dict(change=name, depth=int(group.group)) | means | dict(better=float(better))
            )
    return rows


@torch.no_grad()
def _exit_logprobs(reading: Reading, w: int, routing: Routing) -> dict[int, Tensor]:
    """Log-probability of every token's target had it left at each depth, (T,); undefined where
    there is none."""
    ids, target_T1 = reading.tokens_BT[w].tolist(), reading.targets_BT[w].clamp(min=0)[:, None]
    taken_RT, found, config = routing.taken_RM, {}, reading.model.config
    for depth in range(config.least_depth, config.num_recursions + 1):
        logits_TV = torch.cat(list(exits(reading.model, ids, taken_RT, depth, reading.caches[w])))
        check_finite(logits_TV)
        found[depth] = logits_TV.float().log_softmax(-1).gather(1, target_T1)[:, 0]
    return found


def token_counts(data: TokenData, chunk: int = 1 << 20) -> dict[int, int]:
    """How often each token id occurs."""
    counts: Counter[int] = Counter()
    for piece in _chunks(data, chunk):
        values, times = piece.unique(return_counts=True)
        counts.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    return dict(counts)


def _chunks(data: TokenData, size: int) -> Iterator[Tensor]:
    for start in range(0, len(data), size):
        yield data.tokens(start, min(start + size, len(data)))
