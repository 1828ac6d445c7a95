"""The depth curve of a finished run, measured once and kept beside its result.

Half of the windows, every other one, is what thresholds are fitted to where a router learns; losses
are those of the other half. Routers that learn nothing send all tokens to each whole depth; in
between lies the straight line, which is what a mixture of sequences has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mor import checkpoint
from mor.data.corpus import Corpus, load_corpus
from mor.data.stream import Batch, Fingerprint, Windows
from mor.device import pick_device
from mor.evaluation.calibrate import fit_table
from mor.evaluation.choosers import ConfidenceRouter, by_need, need_of
from mor.evaluation.nll import evaluate
from mor.files import read_json, write_json
from mor.model.budget import EVERYONE, BudgetRouter, DepthTable, has_depths
from mor.model.routers import Router
from mor.model.transformer import Transformer
from mor.run_folder import RunFolder
from mor.training.config import TrainConfig, load_config

CURVES = "depths.json"
FITTED = 131_072
"""Tokens that thresholds are fitted to at most: they are read in one forward."""
AT_ONCE = 4_096
"""Tokens of a forward that losses are measured in."""

Point = dict[str, Any]
"""depth: what was asked for, a number or "full"; mean_depth: what was spent; nll; bits_per_byte;
share_per_recursion."""
Asked = Mapping[str, Any]
"""See :func:`mor.studies.study.curve_asked`."""


def read_curves(path: Path, asked: Asked) -> dict[str, list[Point]] | None:
    """The curves of a run by who chooses, the model's own router under the empty name; None if
    they, or what is now asked, were not measured."""
    file = path / CURVES
    if not file.is_file():
        return None
    found = read_json(file)
    curves: dict[str, list[Point]] | None = found.get("curves")
    return curves if found.get("asked") == asked else None


def measure_missing(
    runs: Iterable[tuple[Path, Asked]], done: Callable[[], None] = lambda: None
) -> dict[Path, str]:
    """Measure the runs whose curves are not there, from their checkpoints. Returns why it failed
    for those that it failed for. done: called after each run."""
    reasons = {}
    for path, asked in runs:
        try:
            if read_curves(path, asked) is None:
                write_json(path / CURVES, measure_curves(path, asked))
        except Exception as error:  # whatever it is, the run itself is finished
            reasons[path] = next(iter(str(error).splitlines()), type(error).__name__)
        done()
    return reasons


def measure_curves(path: Path, asked: Asked) -> dict[str, Any]:
    """What ``CURVES`` holds of a run, from its newest checkpoint and its data."""
    start = time.perf_counter()
    config = load_config(RunFolder(path).settings)
    loaded = checkpoint.load(path, device=pick_device(config.device))
    corpus = load_corpus(config.data, loaded.tokenizer)
    curves = _Measuring(loaded.model, corpus, config, asked).curves()
    return {"asked": dict(asked), "measure_s": time.perf_counter() - start, "curves": curves}


@dataclass(frozen=True)
class _Chosen(Windows):
    """Some windows of others, all of one length."""

    of: Windows
    indices: Sequence[int]

    def text_bytes(self, batch: Batch) -> int:
        return self.of.text_bytes(batch)

    def describe(self) -> str:
        return f"{len(self.indices)} windows of {self.of.describe()}"

    def fingerprint(self) -> Fingerprint:
        return self.of.fingerprint() | {"windows": ",".join(map(str, self.indices))}

    def num_windows(self, seq_len: int) -> int:
        return len(self.indices)

    def batch(self, indices: Sequence[int], seq_len: int, *, documents: bool = False) -> Batch:
        return self.of.batch([self.indices[i] for i in indices], seq_len, documents=documents)


class _Measuring:
    """One model on one corpus."""

    def __init__(
        self, model: Transformer, corpus: Corpus, config: TrainConfig, asked: Asked
    ) -> None:
        self.model, self.corpus, self.config = model, corpus, config
        self.depths: list[float] = list(asked["depths"])
        self.choosers: list[Any] = list(asked["choosers"])
        length, mask = config.seq_len, config.data.document_mask
        some = corpus.validation.spread(length, asked["windows"])
        if len(some) < 2:
            raise ValueError("the validation data holds less than two windows; lower seq_len")
        fitted = some[::2][: max(1, FITTED // length)]
        self.fitted = corpus.validation.batch(fitted, length, documents=mask)
        self.shown = _Chosen(corpus.validation, some[1::2])
        self.settings: dict[str, Any] = dict(
            seq_len=length, document_mask=mask, batch_size=max(1, AT_ONCE // length)
        )
        self.trained = model.config.num_recursions
        self.deepest = max(self.trained, math.ceil(max(self.depths)))

    def curves(self) -> dict[str, list[Point]]:
        if not has_depths(self.model.config):  # one depth, which is full and best, too
            own = self._point(float(self.trained), self.model.router)
            return {"": [own, own | {"depth": "full"}]}
        if not self.model.router.is_learned:
            return {"": self._whole_depths()}
        full = self._point("full", self._all_to(self.trained))
        table = fit_table(self.model, self.fitted, self.deepest, wanted=self.depths)
        own_router = self.model.router
        curve = self._by_table(table, lambda row: BudgetRouter(own_router, row, with_own=False))
        found = {"": [*curve, full]}
        for chooser in self.choosers:  # at full depth there is nothing to choose
            found[chooser] = [*self._chosen_by(chooser, curve), full]
        return found

    def _point(self, depth: float | str, router: Router) -> Point:
        found = evaluate(self.model, self.shown, router=router, **self.settings)
        return {
            "depth": depth,
            "mean_depth": found.mean_depth,
            "nll": found.nll,
            "bits_per_byte": found.bits_per_byte,
            "share_per_recursion": found.share_per_recursion,
        }

    def _row(self, thresholds: Sequence[float]) -> torch.Tensor:
        return torch.tensor([[EVERYONE, *thresholds]], device=self.model.embedding.weight.device)

    def _all_to(self, depth: int) -> Router:
        return BudgetRouter(self.model.router, self._row([EVERYONE] * (depth - 1)), with_own=False)

    def _whole_depths(self) -> list[Point]:
        """All tokens to each whole depth up to the deepest, and lines between for the others."""
        whole = [self._point(float(d), self._all_to(d)) for d in range(1, self.deepest + 1)]
        between = [_between(whole, depth) for depth in self.depths if depth % 1]
        full = whole[self.trained - 1] | {"depth": "full"}
        return [*sorted(whole + between, key=lambda point: float(point["depth"])), full]

    def _by_table(
        self, table: DepthTable, deciding: Callable[[torch.Tensor], Router]
    ) -> list[Point]:
        """At the depths that can be had."""
        return [
            self._point(depth, deciding(self._row(table.at(depth))))
            for depth in self.depths
            if table.has(depth)
        ]

    def _chosen_by(self, chooser: Any, curve: Sequence[Point]) -> list[Point]:
        if chooser == "confidence":

            def unsure(row: torch.Tensor) -> Router:
                return ConfidenceRouter(self.model, row)

            table = fit_table(
                self.model, self.fitted, self.deepest, deciding=unsure, wanted=self.depths
            )
            return self._by_table(table, unsure)
        counts = self.corpus.train.token_counts(self.model.config.vocab_size, self.config.seq_len)
        need = need_of(chooser, counts)

        def chosen(point: Point) -> Point:
            shares = point["share_per_recursion"]
            if {0.0, 1.0}.issuperset(shares):  # all or none: there is nothing to choose
                return point
            return self._point(point["depth"], by_need(self.model, need, shares, self.fitted))

        return [chosen(point) for point in curve]


def _between(whole: Sequence[Point], depth: float) -> Point:
    """The straight line between the whole depths on both sides."""
    low, high = whole[math.floor(depth) - 1], whole[math.floor(depth)]

    def mixed(name: str) -> Any:
        a, b = low[name], high[name]
        return None if a is None else a + (depth % 1) * (b - a)

    names = ("mean_depth", "nll", "bits_per_byte")
    return {"depth": depth, **{name: mixed(name) for name in names}, "between": True}
