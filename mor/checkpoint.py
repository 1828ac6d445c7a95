"""A checkpoint is a directory: config.json, model.safetensors, tokenizer files, training_state/.

transformers reads and writes the same directories (see hf.py), and so names of weights carry its
prefix. It is written under a temporary name and renamed when complete, so a crash leaves no broken
one; checksums.json tells one that was damaged later.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from mor.data.tokenizer import Tokenizer
from mor.model.config import ModelConfig
from mor.model.transformer import Transformer
from mor.training.distributed import ALONE, Ranks

_PROGRESS = Path("training_state") / "progress.json"
_OPTIMIZER = Path("training_state") / "optimizer"
_CHECKSUMS = "checksums.json"
_PREFIX = "model."  # MoRForCausalLM holds the Transformer under this name
# in config.json beside the ModelConfig
_OUR_EXTRAS = {
    "model_type",
    "architectures",
    "eos_token_id",
    "auto_map",
}


class Checkpoint(NamedTuple):
    config: ModelConfig
    model: Transformer
    tokenizer: Tokenizer


def save(
    path: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    progress: dict[str, Any] | None = None,
    optimizers: Sequence[Optimizer] = (),
    ranks: Ranks = ALONE,
) -> Path:
    """Write a checkpoint directory, replacing one of the same name only when the new one is
    complete.

    progress: plain values for resuming. optimizers: theirs is written with it, by every rank its
    share; the weights are always written whole.
    """
    from mor.training import sharded_state as shares

    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        if ranks.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
            (unfinished / _PROGRESS).parent.mkdir(parents=True)
        ranks.wait()
        state = shares.whole_weights(model)
        if optimizers:
            shares.save_optimizers(unfinished / _OPTIMIZER, model, optimizers, ranks)
        if ranks.is_first:
            _write_rest(unfinished, model, state, tokenizer, progress)
            _rename(unfinished, path)
        ranks.wait()
    finally:
        if ranks.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
    return path


def _write_rest(
    folder: Path,
    model: Transformer,
    state: dict[str, Any],
    tokenizer: Tokenizer,
    progress: dict[str, Any] | None,
) -> None:
    extras = {
        "model_type": "mor",
        "architectures": ["MoRForCausalLM"],
        "eos_token_id": tokenizer.end_of_text_id,
    }
    (folder / "config.json").write_text(json.dumps(extras | model.config.to_dict(), indent=2))
    save_file(
        {_PREFIX + name: tensor.detach().contiguous() for name, tensor in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    open_weights(folder)
    tokenizer.save(folder)
    if progress is not None:
        (folder / _PROGRESS).write_text(json.dumps(progress))
    else:
        (folder / _PROGRESS).parent.rmdir()
    sums = {str(f.relative_to(folder)): _checksum(f) for f in folder.rglob("*") if f.is_file()}
    (folder / _CHECKSUMS).write_text(json.dumps(sums, indent=2))


def open_weights(folder: Path) -> None:
    """Let whoever may read config.json read the weights: safetensors writes them for their owner
    alone."""
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)


def _rename(unfinished: Path, path: Path) -> None:
    for file in (*unfinished.rglob("*"), unfinished):
        _flush(file)
    if path.exists():
        old = path.with_name(f".{path.name}.replaced.old")
        path.rename(old)
        unfinished.rename(path)
        shutil.rmtree(old)
    else:
        unfinished.rename(path)
    _flush(path.parent)


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def verify(path: Path) -> None:
    """Raise ValueError naming the first file of a checkpoint that is missing or not as it was
    written."""
    if not (path / _CHECKSUMS).is_file():
        raise ValueError(f"{path} has no {_CHECKSUMS}: it was not written by mor or not to its end")
    for name, expected in json.loads((path / _CHECKSUMS).read_text()).items():
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing")
        if _checksum(path / name) != expected:
            raise ValueError(
                f"{path / name} is damaged: its checksum is not the one it was written with"
            )


def newest_intact(run: Path) -> Path | None:
    """The newest checkpoint of a run, None if it has none yet.

    Raises ValueError if that one is damaged, naming the newest one that is not.
    """
    found = sorted(run.glob("checkpoints/step-*"))
    problems: dict[Path, ValueError] = {}
    for path in reversed(found):
        try:
            verify(path)
        except ValueError as error:
            problems[path] = error
            continue
        if not problems:
            return path
        doomed = " ".join(str(p) for p in problems)
        raise ValueError(
            f"{problems[found[-1]]}; {path} is intact: to go on from there, delete what is damaged "
            f"(rm -r {doomed})"
        ) from problems[found[-1]]
    if problems:
        raise ValueError(f"{problems[found[-1]]}; no checkpoint of {run} is intact") from problems[
            found[-1]
        ]
    return None


def tidy(folder: Path) -> None:
    """Undo what a killed process left in a folder of checkpoints: halves of new ones, old ones set
    aside."""
    for left in folder.glob(".*.tmp"):
        shutil.rmtree(left)
    for aside in folder.glob(".*.old"):
        name = aside.name.removeprefix(".").rsplit(".", 2)[0]
        if (folder / name).exists() or aside.name.endswith(".removed.old"):
            shutil.rmtree(aside)
        else:  # killed between the two renames of a replacement
            aside.rename(folder / name)


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
        raise ValueError(
            f"{path} is neither a checkpoint (no config.json) nor a run with checkpoints in it"
        )
    return found[-1].parent


def load(path: str | Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint or the newest one of a run. Raises ValueError saying what is wrong with
    it."""
    folder = resolve(path)
    config = read_config(folder)
    model = Transformer(config)
    try:
        state = load_file(folder / "model.safetensors")
        model.load_state_dict(
            {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
        )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{folder / 'model.safetensors'} is damaged or belongs to another config: {error}"
        ) from error
    return Checkpoint(config, model.to(device).eval(), Tokenizer.load(folder))


def read_config(folder: Path) -> ModelConfig:
    """The model that a checkpoint directory holds. Raises ValueError if it is none of mor's."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    if values.get("model_type") != "mor":
        raise ValueError(f"{file} does not describe a mor model (model_type is not 'mor')")
    # written by transformers, which adds settings of its own
    theirs = "transformers_version" in values
    ignored = values.keys() - ModelConfig.__dataclass_fields__.keys() if theirs else _OUR_EXTRAS
    return ModelConfig.from_dict(
        {name: value for name, value in values.items() if name not in ignored}
    )


def load_progress(path: str | Path) -> dict[str, Any]:
    """What ``save`` was given as progress. Raises ValueError if the checkpoint has none."""
    file = resolve(path) / _PROGRESS
    if not file.is_file():
        raise ValueError(
            f"{resolve(path)} was saved without training state and cannot be continued"
        )
    return json.loads(file.read_text())


def load_optimizers(
    path: str | Path, model: Transformer, optimizers: Sequence[Optimizer], *, ranks: Ranks = ALONE
) -> None:
    """Fill the optimizers of ``model`` from a checkpoint; it may have been written by another
    number of ranks."""
    from mor.training import sharded_state as shares

    shares.load_optimizers(resolve(path) / _OPTIMIZER, model, optimizers, ranks)


def remove(path: Path) -> None:
    """Delete a checkpoint; it disappears from view first, so that an interruption leaves no half of
    it."""
    doomed = path.with_name(f".{path.name}.removed.old")
    path.rename(doomed)
    shutil.rmtree(doomed)
