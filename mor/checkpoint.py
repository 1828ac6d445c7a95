"""A checkpoint is a directory: config.json, model.safetensors, tokenizer files, training_state/.

transformers reads and writes the same directories (see hub/), so names of weights carry its
prefix. A checkpoint appears under its name when it is complete, so a crash leaves no broken one;
checksums.json shows whether one was damaged later.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mor.data.tokenizer import COMPANIONS, Tokenizer
from mor.files import (
    CHECKSUMS,
    naming,
    read_json,
    renew_checksum,
    replacing,
    verify,
    write_checksums,
)
from mor.model.budget import DepthTable
from mor.model.config import ModelConfig
from mor.model.transformer import Transformer
from mor.run_folder import RunFolder
from mor.weights import (
    WEIGHT_FILES,
    WEIGHTS,
    Shape,
    Weights,
    account,
    bare_names,
    of_state,
    open_weights,
    read_all,
    widest,
)

_CONFIG = "config.json"
_STATE = "training_state"
OPTIMIZER = Path(_STATE) / "optimizer"
"""Where training puts the state of its optimizers."""
_PROGRESS = f"{_STATE}/progress.json"
_READ = (_CONFIG, "adapter_config.json", *WEIGHT_FILES, "tokenizer.json", *COMPANIONS)
_READ_TO_CONTINUE = (f"{_STATE}/*", f"{_STATE}/*/*")
_PREFIX = "model."  # MoRForCausalLM holds the Transformer under this name
# Entries of config.json that are not settings of ModelConfig.
_TABLE = "depth_table"
_OUR_EXTRAS = {"model_type", "architectures", "eos_token_id", "auto_map", _TABLE}


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
        write(
            folder,
            model.config,
            model.state_dict(),
            tokenizer,
            progress=progress,
            depth_table=model.depth_table,
        )
    return path


def write(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    progress: Mapping[str, Any] | None = None,
    depth_table: DepthTable | None = None,
) -> None:
    """Fill a folder, which may hold the optimizers' state already; checksums cover all of it.

    Raises ValueError for what :func:`load` would refuse: weights that are not finite or not those
    of the config, and a tokenizer that is larger than the embedding.
    """
    given = of_state("the model to save", weights)
    state = read_all(given, account(_shapes(_empty(config)), given))
    tokenizer.check_fits(config.vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    ends = list(tokenizer.end_ids)
    extras: dict[str, Any] = {
        "model_type": "mor",
        "architectures": ["MoRForCausalLM"],
        "eos_token_id": ends if len(ends) > 1 else ends[0],
    }
    if depth_table is not None:
        extras[_TABLE] = asdict(depth_table)
    (folder / _CONFIG).write_text(json.dumps(extras | config.to_dict(), indent=2))
    tensors = {_PREFIX + name: tensor.detach().contiguous() for name, tensor in state.items()}
    try:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"could not write the weights: {error}") from error
    share_weights(folder)
    tokenizer.save(folder)
    if progress is not None:
        (folder / _PROGRESS).parent.mkdir(exist_ok=True)
        (folder / _PROGRESS).write_text(json.dumps(progress))
    write_checksums(folder)


def share_weights(folder: Path) -> None:
    """Give the weights config.json's permissions: safetensors lets only their owner read them."""
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / _CONFIG, weights)


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


def check(folder: Path) -> None:
    """Compare all files that :func:`load` reads with their checksums, where the folder has some
    (transformers writes none). Raises ValueError naming the first that is missing, has changed or
    has no checksum.

    What training alone reads is left to :func:`check_to_continue`.
    """
    _check(folder, _READ)


def check_to_continue(folder: Path) -> None:
    """Compare all files that a run goes on from with their checksums, which training always writes.
    Raises ValueError as :func:`check` does."""
    verify(folder, (*_READ, *_READ_TO_CONTINUE))


def _check(folder: Path, read: Sequence[str]) -> None:
    if not (folder / CHECKSUMS).is_file():
        return
    try:
        verify(folder, read)
    except ValueError as error:
        raise ValueError(
            f"{error}. If you changed the folder on purpose, delete {CHECKSUMS} in it"
        ) from None


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> Checkpoint:
    """Read a checkpoint, or the newest one of a run, with the model in evaluation mode.

    dtype: None keeps that of the stored weights. Raises ValueError if there is none, if a file is
    damaged, and if weights, settings and tokenizer do not belong together.
    """
    folder = resolve(path)
    check(folder)
    config, table = read_config(folder), read_depth_table(folder)
    tokenizer = Tokenizer.load(folder)
    with naming(folder):
        tokenizer.check_fits(config.vocab_size)
    model = build(config, open_weights(folder), dtype=dtype)
    model.depth_table = table
    return Checkpoint(config, model.to(device), tokenizer)


def build(
    config: ModelConfig,
    weights: Weights,
    *,
    names: Callable[[str], str] = str,
    left_out: Iterable[str] = (),
    dtype: torch.dtype | None = None,
) -> Transformer:
    """The model of a config with every tensor from ``weights``, in evaluation mode.

    names: what the weights call a tensor of ours. left_out: patterns of names that are not used.
    dtype: None for the one that holds them all exactly. Memory is asked for when all names and
    shapes are known to fit. Raises ValueError where they do not, and for values that are not
    finite.
    """
    model = _empty(config)
    copies = _copies(config, weights, head=names("head.weight"), of=names("embedding.weight"))
    found = account(
        {names(name): shape for name, shape in _shapes(model).items()},
        weights,
        left_out=[*left_out, *copies],
    )
    state = read_all(weights, {name: found[names(name)] for name in model.state_dict()})
    model.to(dtype or widest(state.values()))
    # A copy in any case: what was read may be a view of the file.
    own = {
        name: state.pop(name).to(tensor.dtype, copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(own, assign=True)
    return model.eval()


def _copies(config: ModelConfig, weights: Weights, *, head: str, of: str) -> list[str]:
    """The head of a model that ties it to its embedding, if it is there as a copy of that one.
    Raises ValueError if what is there contradicts the setting."""
    there = bare_names(weights)
    tied = config.tie_embeddings
    if of not in there or tied == (head not in there):
        return []
    if not tied:
        raise ValueError(
            f"{weights.place} has no {head}, though the settings say that the embedding is not "
            "tied to it (tie_word_embeddings or tie_embeddings is false in config.json)"
        )
    if not torch.equal(weights.read(there[head]), weights.read(there[of])):
        raise ValueError(
            f"{weights.place} has a {there[head]} that differs from the embedding, though the "
            "settings tie the two (tie_word_embeddings or tie_embeddings is not false in "
            "config.json)"
        )
    return [head]


def _empty(config: ModelConfig) -> Transformer:
    """The model without memory for its weights. Raises ValueError if nothing could hold them."""
    try:
        with torch.device("meta"), _Undrawn():
            return Transformer(config)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(
            f"no memory holds a model of dim={config.dim:,}, vocab_size={config.vocab_size:,}, "
            f"ffn_dim={config.ffn_dim:,}: {str(error).splitlines()[0]}"
        ) from None


class _Undrawn(TorchFunctionMode):
    """Draws no first weights. Without memory there is nothing to fill, and the first draw there
    costs torch seconds of imports."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.nn.init.kaiming_uniform_, torch.nn.init.normal_):
            return (kwargs or {}).get("tensor", *args[:1])
        return function(*args, **(kwargs or {}))


def _shapes(model: Transformer) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def read_config(folder: Path) -> ModelConfig:
    """The settings of a checkpoint's model. Raises ValueError if the file is damaged or does not
    describe a mor model."""
    file = folder / _CONFIG
    _check(folder, [_CONFIG])
    values = read_json(file)
    if values.get("model_type") != "mor":
        is_llama = values.get("model_type") == "llama"
        way = f"; mor convert {folder} OUT makes one of it" if is_llama else ""
        raise ValueError(
            f"{file} does not describe a mor model: its model_type is "
            f"{values.get('model_type')!r}, not 'mor'{way}"
        )
    with naming(file):
        config, others = ModelConfig.among(values)
        unknown = sorted(others.keys() - _OUR_EXTRAS)
        # A file that transformers wrote also has settings of transformers.
        if unknown and "transformers_version" not in values:
            raise ValueError(f"{', '.join(unknown)}: not a setting of a mor model")
    return config


def read_depth_table(folder: Path) -> DepthTable | None:
    """What depth budgets ask of the model's scores, if it was calibrated. Raises ValueError if the
    table is damaged."""
    file = folder / _CONFIG
    found = read_json(file).get(_TABLE)
    with naming(file):
        return None if found is None else DepthTable.from_dict(found)


def write_depth_table(path: str | Path, table: DepthTable) -> Path:
    """Give the checkpoint that ``path`` means a table, in place of the one that it may have. It
    stands in config.json, which whoever loads, exports or uploads the model takes along."""
    folder = resolve(path)
    check(folder)
    values = read_json(folder / _CONFIG) | {_TABLE: asdict(table)}
    with replacing(folder) as changed:
        shutil.copytree(folder, changed, copy_function=_link_or_copy)
        (changed / _CONFIG).unlink()  # it may be a link, and the old folder keeps its own
        (changed / _CONFIG).write_text(json.dumps(values, indent=2))
        if (changed / CHECKSUMS).is_file():
            renew_checksum(changed, _CONFIG)
    return folder


def _link_or_copy(source: str, target: str) -> None:
    """Weights are large, and the same in both folders."""
    try:
        os.link(source, target)
    except OSError:  # a filesystem without links
        shutil.copy2(source, target)


def has_progress(folder: Path) -> bool:
    """Whether a checkpoint has training state, so that a run can continue from it."""
    return (folder / _PROGRESS).is_file()


def load_progress(path: str | Path) -> dict[str, Any]:
    """What was saved as progress. Raises ValueError if the checkpoint has none."""
    folder = resolve(path)
    if not has_progress(folder):
        raise ValueError(f"{folder} was saved without training state and cannot be continued")
    _check(folder, [_PROGRESS])
    return read_json(folder / _PROGRESS)
