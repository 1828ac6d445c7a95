"""Likelihood of text: NLL, perplexity and bits per byte, causal by default.

B batch · T tokens · V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from mor.data.stream import Batch, Scored, TaskData, Windows
from mor.device import Precision, autocast, moved
from mor.evaluation.finite import require_finite, values_of
from mor.evaluation.score import Score
from mor.model.budget import Depth, router_for
from mor.model.config import Selection
from mor.model.loss import IGNORED
from mor.model.routers import Router
from mor.model.transformer import Output, Transformer


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """nll: nats per predicted token. bits_per_byte: None for the answers of a task, which are no
    text, and for text that the tokenizer loses some of. tokens: that were read. score: the sums
    behind these figures. causal: no token could see later ones. share_per_recursion: of all tokens
    read, those that took each recursion. leak_nats: by how much selection that sees the future
    lowers the NLL on the same text (see :func:`leak`).
    """

    selection: Selection
    causal: bool
    max_depth: int
    tokens: int
    score: Score
    nll: float
    perplexity: float
    bits_per_byte: float | None
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
    depth: Depth = None,
    router: Router | None = None,
    document_mask: bool = False,
    precision: Precision = "auto",
) -> Evaluation:
    """Likelihood of all the data, or of ``max_windows`` windows spread evenly over it.

    The data are cut into windows of ``seq_len`` tokens that do not overlap, and a shorter one at
    the end. Every token but the first is predicted once, from the tokens before it in its window;
    the first has nothing before it and counts neither in the loss nor in the bytes. Bytes are
    those of the predicted tokens.

    selection: ``topk`` reproduces the paper's evaluation, which sees the future, and is labelled
    so.
    depth: the mean depth to spend (model/budget.py), or "full".
    router: decides in place of the model's own.
    document_mask: documents do not see each other, as a model trained so expects.
    precision: of the products; losses are made and added up in float32 and more.

    Raises ValueError for windows longer than the model's context, for data without a token to
    predict, for a depth that the model cannot have or that another setting would change, and if the
    model gives NaN or infinity.
    """
    if depth is not None:
        _check_depth_alone(selection=selection, max_depth=max_depth, router=router)
        router = router_for(model, depth)
    router = router or model.router
    length = window_length(model, seq_len)
    score, read = Score(), 0
    taken = torch.zeros(max_depth or router.num_recursions, dtype=torch.float64)
    device = model.embedding.weight.device
    for some in data.scored(length, max_windows, batch_size=batch_size, documents=document_mask):
        batch = some.batch.to(device)
        with autocast(device, precision):
            output = model(
                batch.tokens_BT,
                targets_BT=batch.targets_BT,
                documents_BT=batch.documents_BT,
                selection=selection,
                max_depth=max_depth,
                router=router,
            )
        require_finite(model, values_of(output), place_of(some))
        score += _score(output, some.batch, data)
        read += batch.tokens_BT.numel()
        taken += torch.tensor(output.routing.tokens_per_recursion())
    return Evaluation(
        selection=selection,
        causal=selection == "threshold" or not router.has_topk,
        max_depth=max_depth or router.num_recursions,
        tokens=read,
        score=score,
        nll=score.nll,
        perplexity=score.perplexity,
        bits_per_byte=score.bits_per_byte,
        mean_depth=float(taken.sum()) / read,
        share_per_recursion=(taken / read).tolist(),
    )


def _check_depth_alone(
    *, selection: Selection, max_depth: int | None, router: Router | None
) -> None:
    if selection == "topk":
        raise ValueError("a depth is a causal rule; it goes with selection='threshold'")
    if max_depth is not None or router is not None:
        raise ValueError("depth, max_depth and router all say how deep; give one of them")


def window_length(model: Transformer, seq_len: int | None) -> int:
    """``seq_len``, or the model's context. Raises ValueError for windows that do not fit it."""
    most = model.config.max_seq_len
    if seq_len is not None and not 1 <= seq_len <= most:
        raise ValueError(f"seq_len must lie in 1..{most} (the model's max_seq_len), got {seq_len}")
    return seq_len or most


def place_of(some: Scored) -> str:
    """Windows in words, counted from 1."""
    first, last = some.windows[0] + 1, some.windows[-1] + 1
    return f"in window {first}" if first == last else f"in windows {first} to {last}"


def _score(output: Output, batch: Batch, data: Windows) -> Score:
    assert output.nll is not None
    asked = int((batch.targets_BT != IGNORED).sum())
    return Score(nats=output.nll.item() * asked, tokens=asked, bytes=data.text_bytes(batch))


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
def by_hops(
    model: Transformer,
    data: TaskData,
    seq_len: int,
    max_windows: int,
    *,
    document_mask: bool = False,
) -> dict[str, Any]:
    """Share of right answers by the hops of the question (from 1) and mean depth of its tokens,
    causal.

    mean_depth_by_hops begins with tokens without a question (0 hops). None for hops that do not
    occur. document_mask: problems of one window do not see each other, as a model trained so
    expects.
    """
    most, device = data.task.hops, model.embedding.weight.device
    asked, right, depth = (torch.zeros(most + 1) for _ in range(3))
    length = window_length(model, seq_len)
    for some in data.scored(length, max_windows, documents=document_mask):
        batch, documents_BT = data.problems(some.windows, seq_len), some.batch.documents_BT
        with autocast(device):
            output = model(
                moved(batch.tokens_BT, device),
                documents_BT=None if documents_BT is None else moved(documents_BT, device),
            )
        require_finite(model, values_of(output), place_of(some))
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
