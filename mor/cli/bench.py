"""mor bench"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from mor.cli.command import Command
from mor.cli.depth import parse_depths
from mor.engine.bench import DecodeRow, Lengths
from mor.model.budget import Depth
from mor.model.transformer import Transformer
from mor.settings import PositiveFloat, PositiveInt, Some


class Bench(Command):
    """How fast this machine is. decode: tokens per second of MoR models and of a vanilla model of
    equal depth, in the same engine, always full.

    Without checkpoints: random weights in the shape of a preset, with depths drawn uniformly.
    """

    what: Positional[Literal["decode"]]
    """What to measure: decode."""
    checkpoint: Path | None = None
    """A trained model to measure, with --baseline."""
    baseline: Path | None = None
    preset: str = "mini"
    recursions: Some[PositiveInt] = (2, 3, 4)
    num_layers: PositiveInt = 26
    """Effective depth of every model."""
    batches: Some[PositiveInt] = (1, 8, 32)
    """Most tokens in a pass. Each model has twice as many slots. The last batch is measured once
    more with as many slots as fit into the bytes of the baseline's keys and values."""
    lengths: Lengths = field(default_factory=Lengths)
    depths: tuple[str, ...] = ()
    """Mean depths to serve all requests with, such as 1.5,2,full: a row for each. Default: each
    model's own rule."""
    rounds: PositiveInt = 5
    seconds: PositiveFloat = 1.0
    """Length of one turn of one model; models take turns."""
    threads: PositiveInt | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 elsewhere."""
    json: bool = False

    def without_effect(self) -> Iterator[tuple[str, str]]:
        if self.checkpoint:
            yield "preset recursions num_layers", "with --checkpoint, which has its own shape"

    def run(self, console: Console) -> None:
        import torch

        from mor.device import pick_device
        from mor.engine.bench import decode_rows, measure_machine

        if (self.checkpoint is None) != (self.baseline is None):
            raise ValueError(
                "--checkpoint and --baseline go together: a speedup needs something to compare with"
            )
        if self.threads:
            torch.set_num_threads(self.threads)
        place = pick_device(self.device)
        dtype = torch.bfloat16 if (self.dtype, place.type) == ("auto", "cuda") else torch.float32
        dtype = dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        baseline, models = self._models()
        depths: list[Depth] = [None]
        if self.depths:  # a share of full depth is of the first model's
            trained = next(iter(models.values())).config.num_recursions
            depths = [d for text in self.depths for d in parse_depths(text, trained)]
        for model in (baseline, *models.values()):
            model.to(place, dtype)
        weight = baseline.embedding.weight
        common: dict[str, Any] = dict(
            lengths=self.lengths,
            machine=measure_machine(weight.device, weight.dtype),
            rounds=self.rounds,
            seconds=self.seconds,
            depths=depths,
        )
        rows: list[DecodeRow] = []
        for batch in self.batches:
            rows += decode_rows(baseline, models, batch=batch, slots=2 * batch, **common)
        rows += decode_rows(baseline, models, batch=self.batches[-1], slots=None, **common)
        if self.json:
            machine = dict(
                device=str(weight.device), threads=torch.get_num_threads(), torch=torch.__version__
            )
            print(json.dumps({"rows": [asdict(row) for row in rows], "machine": machine}))
            return
        console.print(self._table(rows))

    def _models(self) -> tuple[Transformer, dict[str, Transformer]]:
        from mor import checkpoint
        from mor.model.config import RouterKind, preset

        if self.checkpoint and self.baseline:
            return checkpoint.load(self.baseline).model, {
                self.checkpoint.name: checkpoint.load(self.checkpoint).model
            }

        def make(recursions: int) -> Transformer:
            router: RouterKind = "random" if recursions > 1 else "fixed"
            shape = preset(
                self.preset,
                num_recursions=recursions,
                num_layers=self.num_layers,
                recipe="paper",
                router=router,
            )
            return Transformer(shape).init_weights().eval()

        return make(1), {f"mor-{r}": make(r) for r in self.recursions}

    @staticmethod
    def _table(rows: list[DecodeRow]) -> Table:
        made = Table(
            title="Decoding, keys, values and head included",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=0,
        )
        columns: dict[str, Callable[[DecodeRow], str]] = {
            "model": lambda r: r.model,
            "batch": lambda r: str(r.batch),
            "slots": lambda r: str(r.slots),
            "tok/s": lambda r: f"{r.tokens_per_s:,.0f}",
            "speedup": lambda r: f"{r.speedup:.2f}",
            "limit": lambda r: f"{r.limit:.2f}",
            "layers": lambda r: (
                "–" if r.block_only_speedup is None else f"{r.block_only_speedup:.2f}"
            ),
            "depth": lambda r: f"{r.mean_depth:.2f}",
            "host µs": lambda r: f"{r.host_us_per_step:,.0f}",
            "KV bytes": lambda r: f"{r.kv_bytes_per_token:,.0f}",
        }
        for name in columns:
            made.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
        for row in rows:
            made.add_row(*(value(row) for value in columns.values()))
        return made
