"""mor convert"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

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
    gate_of,
    kv_strategy_of,
)
from mor.settings import PositiveFloat, PositiveInt, Seed


class Convert(Command):
    """Convert a Llama-type model to a mor checkpoint or back, or initialise a recursive or MoR
    model from it.

    SOURCE is a Llama directory, a .gguf file, a name on the Hugging Face hub, or a mor checkpoint
    or run.
    """

    source: Positional[str]
    out: Positional[Path]
    to: Literal["mor", "llama", "remote-code"] = "mor"
    """llama writes a directory that transformers reads as LlamaForCausalLM; remote-code copies a
    mor checkpoint together with the code that runs it, for transformers with trust_remote_code=True
    where mor is not installed."""
    num_recursions: PositiveInt | None = None
    """Initialise a model that applies its shared layers this often. Default: a plain copy."""
    sharing: Sharing | None = None
    """Default: middle_cycle."""
    init: Literal["stepwise", "average", "lower", "upper", "random"] | None = None
    """Source layers that the shared ones start from: at regular intervals (default), the mean of
    those they stand in for, the first, the last, or none."""
    num_layers: PositiveInt | None = None
    """Effective depth. Default: the one nearest to the source's that the sharing scheme allows."""
    router: RouterKind | None = None
    """Default: expert_choice with several recursions; fixed gives a Recursive Transformer."""
    recipe: Recipe = "recommended"
    """Gate, keys and values where they are not given; see mor train --help."""
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

        options = ("sharing", "init", "num_layers", "router", "gate", "alpha", "kv_strategy")
        given = {name: value for name in options if (value := getattr(self, name)) is not None}
        if self.to == "remote-code":
            self._export(given)
            return
        if given and self.num_recursions is None:
            flags = ", ".join(map(flag, given))
            raise ValueError(
                f"a plain copy has no use for {flags}; add --num-recursions N or leave it out"
            )
        kind = given.pop("router", "expert_choice" if (self.num_recursions or 1) > 1 else "fixed")
        gate = {name: given.pop(name) for name in ("gate", "alpha") if name in given}
        defaults = {"kv_strategy": kv_strategy_of(kind, self.recipe)}
        settings: dict[str, Any] = (
            (defaults if self.num_recursions else {})
            | given
            | {
                "router": RouterConfig(kind=kind, **(gate_of(kind, self.recipe) | gate)),
                "dtype": self.dtype,
                "seed": self.seed,
            }
        )
        done = convert(
            self.source, self.out, to=self.to, num_recursions=self.num_recursions, **settings
        )
        if self.json:
            print(json.dumps(asdict(done)))
            return
        for line in done.lines():
            console.print(line, highlight=False, soft_wrap=True)

    def _export(self, given: dict[str, Any]) -> None:
        from mor.conversion.remote_code import export

        others = [
            *given,
            *(name for name in ("num_recursions", "dtype") if getattr(self, name) is not None),
        ]
        if others:
            raise ValueError(
                "--to remote-code copies a checkpoint as it is; leave out "
                f"{', '.join(map(flag, others))}"
            )
        print(f"{export(self.source, self.out)}: load it with trust_remote_code=True")
