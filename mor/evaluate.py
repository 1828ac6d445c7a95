"""Validation: negative log-likelihood and bits per byte, causal by default."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from mor.config import Selection
from mor.data import TokenData
from mor.model import Transformer


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """nll: nats per token. causal: no token could see later ones. share_per_recursion: of the tokens.
    leak_nats: by how much selection that sees the future lowers the NLL on the same text (see leak)."""

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
    data: TokenData,
    *,
    seq_len: int | None = None,
    batch_size: int = 16,
    max_windows: int | None = None,
    selection: Selection = "threshold",
    max_depth: int | None = None,
    document_mask: bool = False,
) -> Evaluation:
    """Mean NLL over consecutive windows of the data.

    selection: ``topk`` reproduces the paper's evaluation, which sees the future, and is labelled so.
    document_mask: documents do not see each other, as a model trained so expects.
    max_windows: only that many windows, spread evenly.
    """
    length = seq_len or model.config.max_seq_len
    available = data.windows(length)
    if available < 1:
        raise ValueError(f"the data holds {len(data)} tokens, less than one window of {length + 1}; lower seq_len")
    count = min(max_windows or available, available)
    chosen = [i * available // count for i in range(count)]
    device = model.embedding.weight.device
    nll = 0.0
    taken = torch.zeros(max_depth or model.config.num_recursions)
    for start in range(0, count, batch_size):
        batch = data.batch(chosen[start : start + batch_size], length, documents=document_mask)
        output = model(
            batch.tokens_BT.to(device),
            targets_BT=batch.targets_BT.to(device),
            documents_BT=None if batch.documents_BT is None else batch.documents_BT.to(device),
            selection=selection,
            max_depth=max_depth,
        )
        nll += output.nll.item() * batch.targets_BT.numel()
        taken += torch.tensor(output.routing.tokens_per_recursion())
    tokens = count * length
    bytes_per_token = data.num_bytes / len(data)
    return Evaluation(
        selection=selection,
        causal=selection == "threshold" or not model.recursions.router.has_topk,
        max_depth=max_depth or model.config.num_recursions,
        tokens=tokens,
        nll=nll / tokens,
        perplexity=math.exp(nll / tokens),
        bits_per_byte=nll / tokens / math.log(2) / bytes_per_token,
        mean_depth=float(taken.sum()) / tokens,
        share_per_recursion=(taken / tokens).tolist(),
    )


def leak(model: Transformer, data: TokenData, **settings: Any) -> tuple[Evaluation, Evaluation]:
    """The same text with top-k and with causal selection; the former carries ``leak_nats``.

    The leak is causal NLL minus top-k NLL: what the paper's evaluation gains from comparing a token with
    later ones, less what the thresholds lose by deciding otherwise than top-k. Settings as in evaluate.
    """
    causal = evaluate(model, data, selection="threshold", **settings)
    topk = evaluate(model, data, selection="topk", **settings)
    return replace(topk, leak_nats=causal.nll - topk.nll), causal
