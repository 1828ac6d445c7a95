"""Convert models: Llama to mor and back, or into an initialised recursive or MoR model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mor import checkpoint
from mor.checkpoint import Checkpoint
from mor.conversion.deepen import Deepening, deepen
from mor.conversion.gguf import read_gguf
from mor.conversion.initialise import Init, fitting_depth, layer_sources, recursive_init
from mor.conversion.layers import count_parameters
from mor.conversion.llama import read_llama, save_llama
from mor.files import read_json
from mor.model.config import KVStrategyName, ModelConfig, RouterConfig, Sharing, layout

DType = Literal["float32", "bfloat16", "float16"]


def read_source(source: str) -> Checkpoint:
    """Read a Llama directory, a GGUF file, a mor checkpoint or run, or a model of the Hugging Face
    hub by name, in the dtype of its weights.

    Raises ValueError if it is none of these or holds a model that mor does not have.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file but not a .gguf file; give the model's directory")
        return read_gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            path = checkpoint.resolve(path)
        if read_json(path / "config.json").get("model_type") == "mor":
            return checkpoint.load(path, dtype=None)
        return read_llama(str(path))
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise ValueError(
            f"{source} does not exist; give a directory, a .gguf file or a hub name such as "
            "owner/model"
        )
    return read_llama(source)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done. layers: for an initialisation, the layers of the unrolled source that each
    stored layer starts from."""

    source: str
    out: str
    written_as: Literal["mor", "llama"]
    family: str
    layout: str
    source_layers: int
    num_layers: int
    init: Init | None
    deepened: bool
    layers: dict[str, tuple[int, ...]]
    dtype: str
    params_before: int
    params_after: int

    def lines(self) -> list[str]:
        """For people: what was written, and where every layer came from."""
        return [
            f"{self.out}: {self.family.replace('mor', 'MoR')} model in {self.dtype}, written for "
            f"{self.written_as}",
            f"layers: {self.layout} = {self.num_layers} effective "
            f"(prelude + shared x recursions + coda), source {self.source_layers}",
            *(
                ["  it is the source: what is added changes nothing before training"]
                if self.deepened
                else [f"  {name:<10} <- {_origin(group)}" for name, group in self.layers.items()]
            ),
            f"parameters: {self.params_before:,} before, {self.params_after:,} after",
        ]


def convert(
    source: str,
    out: Path,
    *,
    to: Literal["mor", "llama"] = "mor",
    num_recursions: int | None = None,
    sharing: Sharing = "middle_cycle",
    init: Init = "stepwise",
    num_layers: int | None = None,
    router: RouterConfig | None = None,
    kv_strategy: KVStrategyName = "recursion_wise",
    deepening: Deepening | None = None,
    dtype: DType | None = None,
    seed: int = 0,
) -> Conversion:
    """Read ``source``, write ``out``; with ``num_recursions``, initialise a recursive or MoR model;
    with ``deepening``, let the source apply some of its layers again.

    num_layers: effective depth; None takes the one nearest to the source's that fits. router: None
    is fixed depth. dtype: None keeps the source's. Raises ValueError if ``out`` is not empty, for a
    source that cannot be read and for settings that do not fit.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists; choose another directory or delete it")
    if to == "llama" and (num_recursions is not None or deepening is not None):
        raise ValueError(
            "to='llama' writes the source as it is; leave out num_recursions and deepening, or "
            "write with to='mor'"
        )
    if num_recursions is not None and deepening is not None:
        raise ValueError(
            "num_recursions makes a model anew, deepening keeps the source; give one of them"
        )
    found = read_source(source)
    config, model = found.config, found.model
    sources: list[tuple[int, ...]] = []
    if deepening is not None:
        model = deepen(model, deepening, seed=seed)
        config, sources = model.config, [(i,) for i in range(config.num_layers)]
    if num_recursions is not None:
        depth = num_layers or fitting_depth(config.num_layers, num_recursions, sharing)
        config = config.replace(
            router=router or RouterConfig(kind="fixed"),
            kv_strategy=kv_strategy,
            lora_rank=0,
            lora_alpha=None,
            lora_from=2,
            **layout(depth, num_recursions, sharing),
        )
        sources = layer_sources(config, found.config.num_layers, init)
        model = recursive_init(model, config, init, seed=seed)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    if to == "llama":
        params = save_llama(out, model, found.tokenizer)
    else:
        checkpoint.save(out, model, found.tokenizer)
        params = count_parameters(model)
    return Conversion(
        source=source,
        out=str(out),
        written_as=to,
        family=config.family,
        layout=config.layout_name,
        source_layers=found.config.num_layers,
        num_layers=config.num_layers,
        init=init if num_recursions is not None else None,
        deepened=deepening is not None,
        layers=dict(zip(_layer_names(config), sources, strict=True)) if sources else {},
        dtype=str(model.embedding.weight.dtype).removeprefix("torch."),
        params_before=count_parameters(found.model),
        params_after=params,
    )


def _origin(group: tuple[int, ...]) -> str:
    if not group:
        return "fresh weights"
    if len(group) == 1:
        return f"source layer {group[0]}"
    return f"mean of source layers {', '.join(map(str, group))}"


def _layer_names(config: ModelConfig) -> list[str]:
    parts = {
        "prelude": config.prelude_layers,
        "shared": config.shared_layers,
        "coda": config.coda_layers,
    }
    return [f"{part} {i}" for part, number in parts.items() for i in range(number)]
