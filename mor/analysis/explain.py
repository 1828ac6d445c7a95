"""Everything a model did with a text, token by token, as plain records.

Decisions are those of threshold selection, which is causal. What a token *would* have predicted at
another depth is computed, not estimated (see branches.py).

T tokens · V vocab · R recursions · B rows of the batch · M packed tokens
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from mor.analysis.branches import exits
from mor.analysis.classes import BLOCK, LEAST, depth_by_class, kinds
from mor.data.problems import Task
from mor.data.spelling import spells
from mor.data.tokenizer import Tokenizer
from mor.evaluation.score import Score
from mor.model.budget import Depth, budget_of, router_for
from mor.model.kv_cache import KVCache
from mor.model.loss import IGNORED
from mor.model.routers import Router
from mor.model.routing import Routing
from mor.model.transformer import Transformer
from mor.statistics import GroupMean, group_means


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A token that the model expected next, with its probability."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """A token at recursion ``recursion`` (from 1).

    taken: whether it took it. score: what the decision looks at, 0..1: sigmoid of the causal logit
    against ``threshold`` (expert-choice) or the share of this depth in the softmax or sigmoid
    scores (token-choice); None where the token was no candidate or the router scores nothing.
    threshold: None where every candidate is taken or the largest score wins. gate: weight of the
    stack's output, which token-choice by default applies at a token's last recursion only; None
    where not taken, and for routers without gates of their own.

    exit_*: the prediction had this token, and no other, left after this many recursions: state,
    coda and head as in the model. At the depth that the token took it is the model's own. logprob
    of the target (None where there is none) and entropy in nats.
    """

    recursion: int
    taken: bool
    score: float | None
    threshold: float | None
    gate: float | None
    exit_logprob: float | None
    exit_entropy: float
    exit_guesses: list[Guess]


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """A token that was read. start, end: its characters in the text. piece: that text; "" where a
    character is spread over several tokens and this is not the last. position: in its window.
    depth: recursions it took.
    target: what is right here, the real next token or the answer of a task; None where nothing is.
    logprob: of the target, in nats. rank: of the target, 1 is the best guess. more, fewer: by how
    much ``logprob`` changes with one recursion more or fewer for this token alone; None where there
    is no such depth. count: occurrences in the text, or in the corpus given. kind: one of
    classes.KINDS, or what the word of a task is for.
    """

    index: int
    start: int
    end: int
    token_id: int
    token: str
    piece: str
    kind: str
    count: int
    position: int
    depth: int
    target_id: int | None
    target: str | None
    logprob: float | None
    entropy: float
    rank: int | None
    more: float | None
    fewer: float | None
    steps: list[Step]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What :func:`explain` found. model: its description. asked: what targets are. text_bytes: of
    the targets; 0 for answers, which are no text, and for text that the tokenizer loses some
    of."""

    name: str
    text: str
    model: dict[str, Any]
    asked: Literal["next token", "answer"]
    window: int
    text_bytes: int
    tokens: list[TokenRecord]

    @property
    def mean_depth(self) -> float:
        return sum(t.depth for t in self.tokens) / len(self.tokens)

    @property
    def score(self) -> Score:
        """Of the tokens that have a target. A text's first token is not one, nor are its bytes."""
        known = [t.logprob for t in self.tokens if t.logprob is not None]
        return Score(nats=-sum(known), tokens=len(known), bytes=self.text_bytes)

    @property
    def nll(self) -> float | None:
        """Nats per target; None if there is none."""
        return self.score.nll if self.score.tokens else None

    @property
    def bits_per_byte(self) -> float | None:
        """None for answers, which are not text."""
        return self.score.bits_per_byte

    def records(self) -> list[dict[str, Any]]:
        """Tidy rows for pandas, one per token and recursion, with the best guess alone."""
        own = [f.name for f in fields(TokenRecord) if f.name != "steps"]
        rows = []
        for token in self.tokens:
            of_token = {name: getattr(token, name) for name in own}
            for step in token.steps:
                best = step.exit_guesses[0]
                of_step = {
                    f.name: getattr(step, f.name) for f in fields(Step) if f.name != "exit_guesses"
                }
                rows.append(
                    of_token
                    | of_step
                    | {"exit_guess": best.text, "exit_probability": best.probability}
                )
        return rows

    def by_class(self) -> dict[str, list[GroupMean]]:
        """Mean depth by kind, position and frequency; intervals over blocks of ``BLOCK`` tokens."""
        return depth_by_class(
            [t.depth for t in self.tokens],
            kind=[t.kind for t in self.tokens],
            position=[t.position for t in self.tokens],
            count=[t.count for t in self.tokens],
            blocks=[t.index // BLOCK for t in self.tokens],
        )

    def counterfactuals(self) -> dict[str, list[GroupMean]]:
        """Mean change of log-probability with one recursion fewer or more, by depth taken."""
        found = {}
        for name in ("fewer", "more"):
            known = sorted(
                (t for t in self.tokens if getattr(t, name) is not None), key=lambda t: t.depth
            )
            found[name] = group_means(
                [getattr(t, name) for t in known],
                [str(t.depth) for t in known],
                [t.index // BLOCK for t in known],
                at_least=LEAST,
            )
        return found

    def flow(self) -> list[dict[str, int]]:
        """Counts of tokens by whether they are in (1) or out (0) at one recursion and the next."""
        moves: Counter[tuple[int, bool, bool]] = Counter()
        for token in self.tokens:
            for before, after in pairwise(token.steps):
                moves[before.recursion, before.taken, after.taken] += 1
        return [
            dict(recursion=r, taken=int(a), next_taken=int(b), tokens=n)
            for (r, a, b), n in sorted(moves.items())
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        whole = dict(
            nll=self.nll, bits_per_byte=self.bits_per_byte, mean_depth=self.mean_depth, causal=True
        )
        return asdict(self) | {
            "summary": whole | {"tokens": len(self.tokens)},
            "by_class": {
                name: [asdict(g) for g in groups] for name, groups in self.by_class().items()
            },
            "counterfactuals": {
                name: [asdict(g) for g in groups] for name, groups in self.counterfactuals().items()
            },
            "flow": self.flow(),
        }


def explain(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    name: str = "model",
    window: int | None = None,
    guesses: int = 5,
    counts: Mapping[int, int] | None = None,
    answers: Sequence[int] | None = None,
    task: Task | None = None,
    depth: Depth = None,
) -> Explanation:
    """Read ``text`` and record what happened to every token.

    window: tokens that are read together (default: the model's max_seq_len). A longer text is read
    in windows that overlap by half, and each token is shown as in the window that gives it most
    context. counts: occurrences of token ids in a corpus (default: in the text). answers: of a
    model trained on a task, what is right at each token (see ``Task.answers``), in place of the
    next token. task: the one that the text belongs to, if any; it names the kinds of tokens. depth:
    the mean depth (model/budget.py), of a budget that stays within the trained recursions.

    Raises ValueError for an empty text, a window that does not fit the model, answers that do not
    fit the text and a model that gives NaN or infinity.
    """
    config, (ids, pieces) = model.config, tokenizer.encode_with_pieces(text)
    window = window or config.max_seq_len
    if not ids:
        raise ValueError("the text is empty; give at least one character")
    if not 2 <= window <= config.max_seq_len:
        raise ValueError(
            f"window must lie in 2..{config.max_seq_len} (the model's max_seq_len), got {window}"
        )
    if answers is not None and len(answers) != len(ids):
        raise ValueError(
            f"{len(answers)} answers for {len(ids)} tokens; give one for each, {IGNORED} for none"
        )
    targets = [*ids[1:], IGNORED] if answers is None else answers
    counts = Counter(ids) if counts is None else counts
    of_token: dict[str, list[Any]] = dict(
        token_id=ids,
        token=[tokenizer.backend.id_to_token(i) for i in ids],
        piece=pieces,
        kind=kinds(tokenizer, ids, pieces, task),
        count=[counts.get(i, 0) for i in ids],
    )
    reader = _Reader(model, tokenizer, guesses, _router(model, depth))
    tokens: list[TokenRecord] = []
    end = 0
    for found in reader.read(ids, targets, window):
        i, start, end = len(tokens), end, end + len(pieces[len(tokens)])
        own = {key: values[i] for key, values in of_token.items()}
        tokens.append(TokenRecord(index=i, start=start, end=end, **own, **found))
        if not _is_finite(tokens[-1]):
            raise ValueError(
                f"{name} gives values that are not finite (at token {i + 1}); its weights are "
                "broken, take another checkpoint"
            )
    asked: Literal["next token", "answer"] = "next token" if answers is None else "answer"
    is_spelt = answers is None and _is_spelt(tokenizer, ids, pieces)
    before, after = torch.tensor([ids[:-1], ids[1:]], dtype=torch.int64)
    return Explanation(
        name=name,
        text=text,
        model=describe(model),
        asked=asked,
        window=window,
        text_bytes=tokenizer.text_bytes.of(before, after) if is_spelt else 0,
        tokens=tokens,
    )


def _is_spelt(tokenizer: Tokenizer, ids: Sequence[int], pieces: Sequence[str]) -> bool:
    """Whether the tokens have the bytes of the text, markup aside. Raises ValueError for a text
    that the tokenizer cannot read."""
    read = [(i, p) for i, p in zip(ids, pieces, strict=True) if i not in tokenizer.markup_ids]
    return spells(tokenizer, ["".join(p for _, p in read)], [[i for i, _ in read]], "the text")


def _is_finite(token: TokenRecord) -> bool:
    """Whether the model gave numbers for it: an entropy is NaN if any logit is NaN or infinite."""
    found = [
        token.entropy,
        *(x for s in token.steps for x in (s.score, s.threshold, s.exit_entropy)),
    ]
    return all(x is None or math.isfinite(x) for x in found)


def describe(model: Transformer) -> dict[str, Any]:
    """What a reader wants to know of the model."""
    config = model.config
    return dict(
        family=config.family,
        num_recursions=config.num_recursions,
        router=config.router.kind,
        kv_strategy=config.kv_strategy,
        layers=config.layout_name,
        order=config.shared_order,
        dim=config.dim,
        vocab_size=config.vocab_size,
    )


def _router(model: Transformer, depth: Depth) -> Router:
    """What decides the depths, over the trained recursions. Raises ValueError for a budget that
    goes beyond them."""
    trained = model.config.num_recursions
    if (most := budget_of(model, depth).recursions) > trained:
        raise ValueError(
            f"depth={depth} lets tokens take up to {most} recursions; an explanation shows the "
            f"{trained} that were trained: choose a smaller depth"
        )
    return router_for(model, depth, at_least=trained)


def shown(value: float, digits: int) -> str:
    """A number rounded as the page rounds it, halves away from zero."""
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def windows(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(start, first token reported, stop) of half-overlapping windows, each token in one report."""
    start = first = 0
    while True:
        stop = min(start + window, length)
        yield start, first, stop
        if stop == length:
            return
        first, start = stop, stop - window // 2


class _Reader:
    """Reads windows of ids and records, token by token, what the text alone does not show."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, guesses: int, router: Router
    ) -> None:
        self.model, self.tokenizer, self.router = model, tokenizer, router
        self.guesses = min(guesses, model.config.vocab_size)
        self.names: dict[int, str] = {}

    def read(
        self, ids: Sequence[int], targets: Sequence[int], window: int
    ) -> Iterator[dict[str, Any]]:
        for start, first, stop in windows(len(ids), window):
            yield from self._window(list(ids[start:stop]), list(targets[first:stop]), first - start)

    @torch.no_grad()
    def _window(self, ids: list[int], targets: list[int], first: int) -> list[dict[str, Any]]:
        """Fields of the tokens from ``first`` on, to which ``targets`` belong."""
        model, device = self.model, self.model.embedding.weight.device
        cache = KVCache(model.config, 1, device=device, dtype=model.embedding.weight.dtype)
        output = model(torch.tensor([ids], device=device), cache=cache, router=self.router)
        taken_RT = output.routing.taken_RM
        own = self._predictions(output.logits_BTV[0, first:], targets)
        depths = taken_RT.sum(0).tolist()
        by_depth: dict[int, list[dict[str, Any]]] = {}
        for depth in range(model.config.least_depth, model.config.num_recursions + 1):
            # At the depth that a token took, its exit is the model's own prediction.
            predicted, done = list(own), 0
            places = [t for t in range(first, len(ids)) if depths[t] != depth]
            for logits_MV in exits(model, ids, taken_RT, depth, cache, places=places):
                part = [t - first for t in places[done : done + len(logits_MV)]]
                for i, found in zip(
                    part, self._predictions(logits_MV, [targets[i] for i in part]), strict=True
                ):
                    predicted[i] = found
                done += len(logits_MV)
            by_depth[depth] = predicted
        routed = routing_columns(self.router, output.routing)
        return [
            _token_fields(
                t,
                depths[t],
                own[t - first],
                {depth: found[t - first] for depth, found in by_depth.items()},
                routed,
            )
            for t in range(first, len(ids))
        ]

    def _predictions(self, logits_MV: Tensor, targets: list[int]) -> list[dict[str, Any]]:
        """The target with its log-probability and rank, entropy, best guesses of each row."""
        logp_MV = logits_MV.float().log_softmax(-1)
        entropies = logp_MV.exp().mul_(logp_MV).sum(-1).neg().tolist()
        top = logp_MV.topk(self.guesses)
        logp_M1 = logp_MV.gather(
            1, torch.tensor(targets, device=logits_MV.device).clamp(min=0)[:, None]
        )
        # Sums of booleans are slow.
        ranks = ((logp_MV > logp_M1).float().sum(1).int() + 1).tolist()
        columns = (
            targets,
            logp_M1[:, 0].tolist(),
            ranks,
            entropies,
            top.indices.tolist(),
            top.values.exp().tolist(),
        )
        nothing = dict(target_id=None, target=None, logprob=None, rank=None)
        return [
            dict(entropy=entropy, guesses=self._guesses(best, p))
            | (
                nothing
                if i == IGNORED
                else dict(target_id=i, target=self._name(i), logprob=logp, rank=rank)
            )
            for i, logp, rank, entropy, best, p in zip(*columns, strict=True)
        ]

    def _guesses(self, ids: list[int], probabilities: list[float]) -> list[Guess]:
        return [
            Guess(token_id=i, text=self._name(i), probability=p)
            for i, p in zip(ids, probabilities, strict=True)
        ]

    def _name(self, token_id: int) -> str:
        """Its text, or its name in the vocabulary where it is only part of a character."""
        if token_id not in self.names:
            text = self.tokenizer.decode([token_id])
            whole = text and "\ufffd" not in text
            self.names[token_id] = (
                text if whole else self.tokenizer.backend.id_to_token(token_id) or f"#{token_id}"
            )
        return self.names[token_id]


def routing_columns(router: Router, routing: Routing) -> list[dict[str, list[Any]]]:
    """For each recursion: taken, score, threshold and gate of every token of one sequence."""
    found = []
    for r, step in enumerate(routing.steps):
        scored = router.shown_score(routing, r)
        score = [None] * len(routing.tokens) if scored is None else _known(scored)
        threshold = router.threshold(r) if routing.rule.capacities[r] < 1 else None
        gate: list[float | None] = [None] * len(score)
        if step.gate is not None:
            gate = _known(routing.gate_BT(r).flatten())
        taken = routing.selected(r).tolist()
        found.append(dict(taken=taken, score=score, threshold=[threshold] * len(score), gate=gate))
    return found


def _known(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _token_fields(
    t: int,
    depth: int,
    own: dict[str, Any],
    by_depth: dict[int, dict[str, Any]],
    routed: list[dict[str, list[Any]]],
) -> dict[str, Any]:
    """Fields of a TokenRecord that the model decides."""
    steps = [
        Step(
            recursion=r + 1,
            **{name: column[t] for name, column in columns.items()},
            exit_logprob=by_depth[r + 1]["logprob"],
            exit_entropy=by_depth[r + 1]["entropy"],
            exit_guesses=by_depth[r + 1]["guesses"],
        )
        for r, columns in enumerate(routed)
    ]
    logprob = own["logprob"]

    def change(other: int) -> float | None:
        if logprob is None or other not in by_depth:
            return None
        changed: float = by_depth[other]["logprob"] - logprob
        return changed

    return dict(
        position=t,
        depth=depth,
        **{name: own[name] for name in ("target_id", "target", "logprob", "entropy", "rank")},
        more=change(depth + 1),
        fewer=change(depth - 1),
        steps=steps,
    )
