"""Validation: negative log-likelihood and bits per byte, causal by default.

B batch · T tokens · V vocabulary
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from mor.data.stream import TaskData, Windows
from mor.model.config import Selection
from mor.model.loss import IGNORED
from mor.model.routers import Router
from mor.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """nll: nats per token. causal: no token could see later ones. share_per_recursion: of all
    tokens, those that took each recursion. leak_nats: by how much selection that sees the future
    lowers the NLL on the same text (see :func:`leak`)."""

    selection: Selection
    causal: bool
    max_depth: int
    tokens: int
    nll: float
    perplexity: float
    bits_per_byte: float
    mean_depth: float
    share_per_recursion: list[float]
    leak_nats: float | None = None


@torch.inference_mode()
def evaluate(
    model: Transformer,
    data: Windows,
    *,
    seq_len: int | None = None,
    batch_size: int = 16,
    max_windows: int | None = None,
    selection: Selection = "threshold",
    max_depth: int | None = None,
    router: Router | None = None,
    document_mask: bool = False,
) -> Evaluation:
    """Mean NLL over consecutive windows of the data.

    selection: ``topk`` reproduces the paper's evaluation, which sees the future, and is labelled
    so.
    router: decides in place of the model's own.
    document_mask: documents do not see each other, as a model trained so expects.
    max_windows: only that many windows, spread evenly.

    Raises ValueError for data shorter than a window.
    """
    router = router or model.router
    length = seq_len or model.config.max_seq_len
    chosen = data.spread(length, max_windows)
    count = len(chosen)
    device = model.embedding.weight.device
    nll, targets = 0.0, 0
    taken = torch.zeros(max_depth or router.num_recursions)
    for start in range(0, count, batch_size):
        batch = data.batch(chosen[start : start + batch_size], length, documents=document_mask)
        output = model(
            batch.tokens_BT.to(device),
            targets_BT=batch.targets_BT.to(device),
            documents_BT=None if batch.documents_BT is None else batch.documents_BT.to(device),
            selection=selection,
            max_depth=max_depth,
            router=router,
        )
        assert output.nll is not None
        counted = int((batch.targets_BT != IGNORED).sum())
        nll, targets = nll + output.nll.item() * counted, targets + counted
        taken += torch.tensor(output.routing.tokens_per_recursion())
    tokens = count * length
    nll /= targets
    return Evaluation(
        selection=selection,
        causal=selection == "threshold" or not router.has_topk,
        max_depth=max_depth or router.num_recursions,
        tokens=tokens,
        nll=nll,
        perplexity=math.exp(nll),
        bits_per_byte=nll / math.log(2) / data.bytes_per_token,
        mean_depth=float(taken.sum()) / tokens,
        share_per_recursion=(taken / tokens).tolist(),
    )


def leak(model: Transformer, data: Windows, **settings: Any) -> tuple[Evaluation, Evaluation]:
    """The same text with top-k and with causal selection; the former carries ``leak_nats``.

    The leak is the causal NLL minus the top-k NLL: what the paper's evaluation gains from comparing
    a token with later ones, and what thresholds lose by deciding otherwise. Settings as in
    :func:`evaluate`.
    """
    causal = evaluate(model, data, selection="threshold", **settings)
    topk = evaluate(model, data, selection="topk", **settings)
    return replace(topk, leak_nats=causal.nll - topk.nll), causal


@torch.inference_mode()
def by_hops(model: Transformer, data: TaskData, seq_len: int, max_windows: int) -> dict[str, Any]:
    """Share of right answers by the hops of the question (from 1) and mean depth of its tokens,
    causal.

    mean_depth_by_hops begins with tokens without a question (0 hops). None for hops that do not
    occur.
    """
    count = min(max_windows, data.num_windows(seq_len))
    most = data.task.hops
    asked, right, depth = (torch.zeros(most + 1) for _ in range(3))
    for start in range(0, count, 16):
        indices = range(start, min(start + 16, count))
        batch = data.problems(indices, seq_len)
        output = model(batch.tokens_BT.to(model.embedding.weight.device))
        right_BT = (output.logits_BTV.argmax(-1).cpu() == batch.targets_BT).float()
        for total, value_BT in (
            (asked, torch.ones_like(right_BT)),
            (right, right_BT),
            (depth, output.routing.depth_BT.cpu()),
        ):
            total.index_add_(0, batch.hops_BT.flatten(), value_BT.flatten().float())
    return {
        "answers_right": float(right[1:].sum() / asked[1:].sum()),
        "answers_right_by_hops": _shares(right[1:], asked[1:]),
        "mean_depth_by_hops": _shares(depth, asked),
    }


def _shares(part: torch.Tensor, of: torch.Tensor) -> list[float | None]:
    return [float(a / b) if b else None for a, b in zip(part, of, strict=True)]
