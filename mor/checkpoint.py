"""A checkpoint is a directory: config.json, model.safetensors, tokenizer files, training_state/.

transformers reads and writes the same directories (see hub/), so names of weights carry its
prefix. A checkpoint appears under its name when it is complete, so a crash leaves no broken one;
checksums.json shows whether one was damaged later.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mor.data.tokenizer import Tokenizer
from mor.files import read_json, replacing, write_checksums
from mor.model.config import ModelConfig
from mor.model.transformer import Transformer
from mor.run_folder import RunFolder

OPTIMIZER = Path("training_state") / "optimizer"
"""Where training puts the state of its optimizers."""
_PROGRESS = Path("training_state") / "progress.json"
_WEIGHTS = "model.safetensors"
_PREFIX = "model."  # MoRForCausalLM holds the Transformer under this name
# Entries of config.json that are not settings of ModelConfig.
_OUR_EXTRAS = {"model_type", "architectures", "eos_token_id", "auto_map"}


class Checkpoint(NamedTuple):
    config: ModelConfig
    model: Transformer
    tokenizer: Tokenizer


def save(
    path: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    progress: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint directory, replacing one of the same name only when the new one is
    complete. progress: plain values for whoever continues from it."""
    with replacing(path) as folder:
        write(folder, model.config, model.state_dict(), tokenizer, progress=progress)
    return path


def write(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Fill a folder, which may hold the optimizers' state already; checksums cover all of it."""
    folder.mkdir(parents=True, exist_ok=True)
    extras = {
        "model_type": "mor",
        "architectures": ["MoRForCausalLM"],
        "eos_token_id": tokenizer.end_of_text_id,
    }
    (folder / "config.json").write_text(json.dumps(extras | config.to_dict(), indent=2))
    save_file(
        {_PREFIX + name: tensor.detach().contiguous() for name, tensor in weights.items()},
        folder / _WEIGHTS,
        metadata={"format": "pt"},
    )
    open_weights(folder)
    tokenizer.save(folder)
    if progress is not None:
        (folder / _PROGRESS).parent.mkdir(exist_ok=True)
        (folder / _PROGRESS).write_text(json.dumps(progress))
    write_checksums(folder)


def open_weights(folder: Path) -> None:
    """Give the weights config.json's permissions: safetensors lets only their owner read them."""
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)


def resolve(path: str | Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest one of a run. Raises ValueError if
    there is none."""
    path = Path(path)
    # A run's own config.json links to the newest checkpoint, or to one before it after a crash.
    for folder in (*reversed(RunFolder(path).checkpoints()), path):
        if (folder / "config.json").is_file():
            return folder.resolve() if folder.is_symlink() else folder
    raise ValueError(
        f"{path} is neither a checkpoint (no config.json) nor a run with checkpoints in it"
    )


def load(path: str | Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint, or the newest one of a run, with the model in evaluation mode.

    Raises ValueError if there is none, or if it is damaged.
    """
    folder = resolve(path)
    config = read_config(folder)
    model = Transformer(config)
    try:
        state = load_file(folder / _WEIGHTS)
        model.load_state_dict(
            {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
        )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{folder / _WEIGHTS} is damaged or belongs to another config: {error}"
        ) from error
    return Checkpoint(config, model.to(device).eval(), Tokenizer.load(folder))


def read_config(folder: Path) -> ModelConfig:
    """The settings of a checkpoint's model. Raises ValueError if it is not a mor model."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    if values.get("model_type") != "mor":
        raise ValueError(f"{file} does not describe a mor model (model_type is not 'mor')")
    # A file that transformers wrote also has settings of transformers.
    theirs = "transformers_version" in values
    ignored = values.keys() - ModelConfig.__dataclass_fields__.keys() if theirs else _OUR_EXTRAS
    return ModelConfig.from_dict(
        {name: value for name, value in values.items() if name not in ignored}
    )


def load_progress(path: str | Path) -> dict[str, Any]:
    """What was saved as progress. Raises ValueError if the checkpoint has none."""
    folder = resolve(path)
    if not (folder / _PROGRESS).is_file():
        raise ValueError(f"{folder} was saved without training state and cannot be continued")
    return read_json(folder / _PROGRESS)
