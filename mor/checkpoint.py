"""A checkpoint is a directory: config.json, model.safetensors, tokenizer files, training_state/.

transformers reads and writes the same directories (see hf.py), and so names of weights carry its
prefix. It is written under a temporary name and renamed when complete, so a crash leaves no broken one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mor.config import ModelConfig
from mor.model import Transformer
from mor.tokenizer import Tokenizer

_STATE = Path("training_state") / "state.pt"
_PREFIX = "model."  # MoRForCausalLM holds the Transformer under this name
_OUR_EXTRAS = {"model_type", "architectures", "eos_token_id", "auto_map"}  # in config.json beside the ModelConfig


class Checkpoint(NamedTuple):
    config: ModelConfig
    model: Transformer
    tokenizer: Tokenizer


def save(path: Path, model: Transformer, tokenizer: Tokenizer, *, training_state: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint directory, replacing one of the same name only when the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        extras = {
            "model_type": "mor",
            "architectures": ["MoRForCausalLM"],
            "eos_token_id": tokenizer.end_of_text_id,
        }
        (unfinished / "config.json").write_text(json.dumps(extras | model.config.to_dict(), indent=2))
        state = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, unfinished / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(unfinished)
        if training_state is not None:
            (unfinished / _STATE).parent.mkdir()
            torch.save(training_state, unfinished / _STATE)
        for file in (*unfinished.rglob("*"), unfinished):
            _flush(file)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            unfinished.rename(path)
            shutil.rmtree(old)
        else:
            unfinished.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def resolve(path: str | Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest one of a run directory."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    found = sorted(path.glob("checkpoints/step-*/config.json"))
    if not found:
        raise ValueError(f"{path} is neither a checkpoint (no config.json) nor a run with checkpoints in it")
    return found[-1].parent


def load(path: str | Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint or the newest one of a run. Raises ValueError saying what is wrong with it."""
    folder = resolve(path)
    config = read_config(folder)
    model = Transformer(config)
    try:
        state = load_file(folder / "model.safetensors")
        model.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in state.items()})
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / 'model.safetensors'} is damaged or belongs to another config: {error}") from error
    return Checkpoint(config, model.to(device).eval(), Tokenizer.load(folder))


def read_config(folder: Path) -> ModelConfig:
    """The model that a checkpoint directory holds. Raises ValueError if it is none of mor's."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    if values.get("model_type") != "mor":
        raise ValueError(f"{file} does not describe a mor model (model_type is not 'mor')")
    theirs = "transformers_version" in values  # written by transformers, which adds settings of its own
    ignored = values.keys() - ModelConfig.__dataclass_fields__.keys() if theirs else _OUR_EXTRAS
    return ModelConfig.from_dict({name: value for name, value in values.items() if name not in ignored})


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Optimizer, step, data position and random state. Raises ValueError if the checkpoint has none."""
    file = resolve(path) / _STATE
    if not file.is_file():
        raise ValueError(f"{resolve(path)} was saved without training state and cannot be continued")
    return torch.load(file, map_location="cpu", weights_only=True)


def remove(path: Path) -> None:
    """Delete a checkpoint; it disappears from view first, so that an interruption leaves no half of it."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(doomed)
    shutil.rmtree(doomed)
