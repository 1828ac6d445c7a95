"""mor convert

L layers, and the final state
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from tyro.conf import Positional

from mor.cli.command import Command
from mor.cli.show import flag
from mor.model.config import (
    KVStrategyName,
    Recipe,
    RouterConfig,
    RouterKind,
    Sharing,
    kv_strategy_of,
    router_settings_of,
)
from mor.settings import PositiveFloat, PositiveInt, Seed

if TYPE_CHECKING:
    from mor.conversion.deepen import Deepening


class Convert(Command):
    """Convert a Llama-type model to a mor checkpoint or back, initialise a recursive or MoR model
    from it, or deepen it: keep it and let tokens take some of its layers again.

    SOURCE is a Llama directory, a .gguf file, a name on the Hugging Face hub, or a mor checkpoint
    or run.
    """

    source: Positional[str]
    out: Positional[Path | None] = None
    """The directory to write; nothing is written with --suggest-split."""
    to: Literal["mor", "llama", "remote-code"] = "mor"
    """llama writes a directory that transformers reads as LlamaForCausalLM; remote-code copies a
    mor checkpoint together with the code that runs it, for transformers with trust_remote_code=True
    where mor is not installed."""
    num_recursions: PositiveInt | None = None
    """Initialise a model that applies its shared layers this often; with --deepen, how often the
    block is applied at most (1: only adapters are added, and act in the one pass). Default: a plain
    copy."""
    deepen: bool = False
    """Keep the source whole and let later recursions apply a block of its layers again. They change
    nothing before they are trained."""
    block: str | None = None
    """With --deepen: the layers to apply again, such as 10:20 for layers 10 to 19."""
    adapter: str | None = None
    """With --deepen: adapters of the block for later recursions: lora:RANK, or lora:RANK:ALPHA.
    ALPHA is twice the rank by default."""
    suggest_split: bool = False
    """Print which layers to deepen, measured on held-out text, and write nothing."""
    block_layers: PositiveInt | None = None
    """With --suggest-split: layers of the block. Default: a third of the source's."""
    text: str | None = None
    """With --suggest-split: a file or folder of text, or prepared data, of which the held-out split
    is read. Default: what training holds out of Python's own documentation."""
    sharing: Sharing | None = None
    """Default: middle_cycle."""
    init: Literal["stepwise", "average", "lower", "upper", "random"] | None = None
    """Source layers that the shared ones start from: at regular intervals (default), the mean of
    those they stand in for, the first, the last, or none."""
    num_layers: PositiveInt | None = None
    """Effective depth. Default: the one nearest to the source's that the sharing scheme allows."""
    router: RouterKind | None = None
    """Default: expert_choice with several recursions, gain with --deepen; fixed gives a Recursive
    Transformer."""
    recipe: Recipe = "recommended"
    """Gate, keys and values, and with elastic who decides, where they are not given; see mor train
    --help."""
    gate: Literal["paper", "residual"] | None = None
    """paper: h + g * Stack(h); residual: h + g * (Stack(h) - h). Default: the recipe's."""
    alpha: PositiveFloat | None = None
    """Scale of the gate. Default: the recipe's."""
    kv_strategy: KVStrategyName | None = None
    """Default: the recipe's."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Default: the source's; GGUF weights become float32."""
    seed: Seed = 0
    """For fresh weights: routers and --init random."""
    json: bool = False

    def run(self, console: Console) -> None:
        from mor.conversion.convert import convert

        if self.suggest_split:
            self._suggest(console)
            return
        if self.out is None:
            raise ValueError("say where to write: mor convert SOURCE OUT")
        options = ("sharing", "init", "num_layers", "router", "gate", "alpha", "kv_strategy")
        given = {name: value for name in options if (value := getattr(self, name)) is not None}
        if self.to == "remote-code":
            self._export(self.out, given)
            return
        deepening = self._deepening(given) if self.deepen else None
        if given and self.num_recursions is None and not self.deepen:
            flags = ", ".join(map(flag, given))
            raise ValueError(
                f"a plain copy has no use for {flags}; add --num-recursions N or leave it out"
            )
        if deepening is not None:
            given = {}
        kind = given.pop("router", "expert_choice" if (self.num_recursions or 1) > 1 else "fixed")
        gate = {name: given.pop(name) for name in ("gate", "alpha") if name in given}
        defaults = {"kv_strategy": kv_strategy_of(kind, self.recipe)}
        settings: dict[str, Any] = (
            (defaults if self.num_recursions and not self.deepen else {})
            | given
            | {
                "router": RouterConfig(kind=kind, **(router_settings_of(kind, self.recipe) | gate)),
                "dtype": self.dtype,
                "seed": self.seed,
            }
        )
        done = convert(
            self.source,
            self.out,
            to=self.to,
            num_recursions=None if self.deepen else self.num_recursions,
            deepening=deepening,
            **settings,
        )
        if self.json:
            print(json.dumps(asdict(done)))
            return
        for line in done.lines():
            console.print(line, highlight=False, soft_wrap=True)

    def without_effect(self) -> Iterator[tuple[str, str]]:
        if not self.deepen:
            yield "block adapter", "without --deepen"
        if not self.suggest_split:
            yield "block_layers text", "without --suggest-split"
        else:
            kept = ("source", "out", "suggest_split", "block_layers", "text", "json")
            others = [each.name for each in fields(self) if each.name not in kept]
            yield " ".join(others), "with --suggest-split, which writes nothing"

    def _deepening(self, given: dict[str, Any]) -> Deepening:
        from mor.conversion.deepen import Deepening

        if others := given.keys() - {"router", "kv_strategy"}:
            raise ValueError(
                f"--deepen keeps the source's layers and has a gate of its own; leave out "
                f"{', '.join(map(flag, sorted(others)))}"
            )
        if self.block is None or not (ends := re.fullmatch(r"(\d+):(\d+)", self.block)):
            raise ValueError(
                "--deepen needs --block FIRST:END, such as 10:20 for layers 10 to 19; "
                "mor convert SOURCE --suggest-split proposes one"
            )
        adapter = re.fullmatch(r"lora:(\d+)(?::(\d+(?:\.\d+)?))?", self.adapter or "lora:0")
        if adapter is None:
            raise ValueError(f"--adapter is lora:RANK or lora:RANK:ALPHA, got {self.adapter!r}")
        rank, alpha = adapter.groups()
        kind = given.get("router", "fixed" if self.num_recursions == 1 else "gain")
        scored = router_settings_of(kind, self.recipe) if kind == "expert_choice" else {}
        scored.pop("gate", None)  # whose form is the deepened model's own
        return Deepening(
            block=(int(ends[1]), int(ends[2])),
            num_recursions=self.num_recursions or 2,
            router=RouterConfig(kind=kind, **scored),
            kv_strategy=given.get("kv_strategy", kv_strategy_of(kind, self.recipe)),
            lora_rank=int(rank),
            lora_alpha=float(alpha) if alpha else None,
        )

    def _suggest(self, console: Console) -> None:
        from mor.conversion.convert import read_source
        from mor.conversion.deepen import angular_distances, splits
        from mor.data.config import DataConfig
        from mor.data.corpus import load_corpus, load_tokens

        found = read_source(self.source)
        if self.text is None:
            held_out = load_corpus(DataConfig(), found.tokenizer).validation
        else:
            held_out = load_tokens(self.text, found.tokenizer)
        length = min(256, found.config.max_seq_len)
        distance_LL = angular_distances(found.model, held_out, seq_len=length, max_windows=16)
        layers = self.block_layers or max(1, found.config.num_layers // 3)
        best = splits(distance_LL, layers)
        if self.json:
            print(json.dumps([asdict(split) for split in best]))
            return
        console.print(
            f"blocks of {layers} layers and the angle by which they turn a state (1 = 180 "
            f"degrees), in up to 16 windows of {length} tokens of "
            f"{self.text or 'Python documentation'}:",
            highlight=False,
            soft_wrap=True,
        )
        for split in best[:5]:
            name = f"{split.block[0]}:{split.block[1]}"
            console.print(f"  --block {name:<6} {split.distance:.3f}", highlight=False)

    def _export(self, out: Path, given: dict[str, Any]) -> None:
        from mor.conversion.remote_code import export

        others = [
            *given,
            *(name for name in ("num_recursions", "dtype", "deepen") if getattr(self, name)),
        ]
        if others:
            raise ValueError(
                "--to remote-code copies a checkpoint as it is; leave out "
                f"{', '.join(map(flag, others))}"
            )
        print(f"{export(self.source, out)}: load it with trust_remote_code=True")
