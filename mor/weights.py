"""Weights in files: known by name and shape before any is read, and every one accounted for.

A tensor that a model needs is found or named as missing; a tensor that is there is used, knowingly
left out by name, or named as left over.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mor.files import check_links, read_json

Shape = tuple[int, ...]
WEIGHTS = "model.safetensors"
_PICKLED = "pytorch_model.bin"
WEIGHT_FILES = tuple(
    pattern
    for stem, suffix in (WEIGHTS.split("."), _PICKLED.split("."))
    for pattern in (
        f"{stem}.{suffix}",
        f"{stem}.{suffix}.index.json",
        f"{stem}-*-of-*.{suffix}",
    )
)
"""Patterns of the names that weights have in a folder."""
# What wrappers put before every name: DDP, torch.compile, PEFT, FSDP, Lightning and transformers.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module.", "model.")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Weights:
    """Tensors in one file or several. place: what to call them in messages. read: one tensor, by
    its name in ``shapes``."""

    place: str
    shapes: Mapping[str, Shape]
    read: Callable[[str], Tensor]


def of_state(place: str, state: Mapping[str, Tensor]) -> Weights:
    """Tensors in memory."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return Weights(place, shapes, state.__getitem__)


def open_weights(folder: Path) -> Weights:
    """The weights of a directory: ``model.safetensors``, or the files that its index names; else
    the same of ``pytorch_model.bin``.

    Raises ValueError if there are none, for a damaged file, if index and files differ, and for
    other weights or an adapter beside them, which would be left out.
    """
    check_links(folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter; merge it into the weights first, with PEFT's "
            "merge_and_unload()"
        )
    there = {file.name for pattern in WEIGHT_FILES for file in folder.glob(pattern)}
    for name, read_file in ((WEIGHTS, _read_safetensors), (_PICKLED, _read_pickled)):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.name in there:
            _check_alone(whole, there - {whole.name})
            return read_file(whole)
        if index.name in there:
            place_of = _weight_map(index)
            _check_alone(index, there - {index.name, *place_of.values()})
            return _sharded(index, place_of, read_file)
    raise ValueError(f"{folder} holds no weights (no {WEIGHTS} and no {WEIGHTS}.index.json)")


def _check_alone(read: Path, others: Iterable[str]) -> None:
    """Raise ValueError if there are weights that nobody would read."""
    if strays := sorted(others):
        raise ValueError(
            f"{read} does not name these files of weights beside it: {_listed(strays)}; keep only "
            "what belongs to the model"
        )


def _read_safetensors(file: Path) -> Weights:
    try:
        opened: Any = safe_open(file, framework="pt")
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    return Weights(str(file), shapes, opened.get_tensor)


def _read_pickled(file: Path) -> Weights:
    try:
        with warnings.catch_warnings(action="ignore"):  # on the way to the error
            state = torch.load(file, map_location="cpu", weights_only=True)  # tensors, never code
    except Exception:  # bytes of any kind make it raise errors of any kind
        raise ValueError(
            f"{file} is damaged or holds more than tensors, which mor does not read"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ValueError(f"{file} holds more than tensors by name")
    return of_state(str(file), state)


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor; all of them are there."""
    place_of = read_json(index).get("weight_map")
    if not isinstance(place_of, dict) or not place_of:
        raise ValueError(f"{index} is damaged: it has no weight_map")
    place_of = {tensor: str(name) for tensor, name in place_of.items()}
    names = sorted(set(place_of.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names files outside its folder: {_listed(outside)}")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(f"{index} names files that are missing: {_listed(absent)}")
    return place_of


def _sharded(
    index: Path, place_of: Mapping[str, str], read_file: Callable[[Path], Weights]
) -> Weights:
    """Several files as one. Every tensor of the index is in the file it names, and the files hold
    no others."""
    parts = {name: read_file(index.parent / name) for name in sorted(set(place_of.values()))}
    found = {(tensor, name) for name, part in parts.items() for tensor in part.shapes}
    if differing := sorted({tensor for tensor, _ in found ^ set(place_of.items())}):
        raise ValueError(f"{index} and the files it names differ in: {_listed(differing)}")
    return Weights(
        str(index),
        {tensor: parts[name].shapes[tensor] for tensor, name in place_of.items()},
        lambda tensor: parts[place_of[tensor]].read(tensor),
    )


def account(
    wanted: Mapping[str, Shape], offered: Weights, *, left_out: Iterable[str] = ()
) -> dict[str, str]:
    """For each wanted name the one in the files, which may have prefixes of wrappers before it.

    left_out: patterns of names that may be there and are not used. Raises ValueError naming what is
    missing, left over or of another shape.
    """
    bare = bare_names(offered)
    unused = {name for name in bare if any(fnmatch(name, pattern) for pattern in left_out)}
    missing = [name for name in wanted if name not in bare]
    left_over = [bare[name] for name in bare if name not in wanted and name not in unused]
    other = [
        f"{bare[name]} is {found}, should be {shape}"
        for name, shape in wanted.items()
        if name in bare and (found := offered.shapes[bare[name]]) != shape
    ]
    kinds = {"missing": missing, "left over": left_over, "of another shape": other}
    if problems := [f"{kind}: {_listed(each)}" for kind, each in kinds.items() if each]:
        raise ValueError(
            f"the tensors of {offered.place} are not those of the model that its settings "
            f"describe; {'; '.join(problems)}"
        )
    return {name: bare[name] for name in wanted}


def read_all(weights: Weights, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of :func:`account`'s answer. Raises ValueError for one that holds something else
    than finite numbers."""
    state = {}
    for name, theirs in names.items():
        tensor = weights.read(theirs)
        if tensor.dtype not in _FLOATS:
            raise ValueError(
                f"{theirs} in {weights.place} is stored as {tensor.dtype}, which is no "
                "floating-point type for weights; if they are quantized, use the original model"
            )
        check_finite(theirs, tensor, weights.place)
        state[name] = tensor
    return state


def check_finite(name: str, tensor: Tensor, place: str) -> None:
    """Raise ValueError if a tensor holds nan or infinity."""
    # The extremes of a tensor with nan are nan; isfinite would take ten times as long.
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{name} in {place} has {count:,} values of {tensor.numel():,} that are not finite "
            "(nan or infinity)"
        )


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The floating-point type that holds all of them exactly."""
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})


def bare_names(offered: Weights) -> dict[str, str]:
    """The names in the files by those without prefixes of wrappers."""
    bare = {name: name for name in offered.shapes}
    while prefix := next((p for p in _WRAPPERS if bare and all(n.startswith(p) for n in bare)), ""):
        bare = {name.removeprefix(prefix): theirs for name, theirs in bare.items()}
    # transformers puts its prefix before all but the head.
    named: dict[str, list[str]] = {}
    for name, theirs in bare.items():
        named.setdefault(name.removeprefix("model."), []).append(theirs)
    if twice := [" and ".join(theirs) for theirs in named.values() if len(theirs) > 1]:
        raise ValueError(f"{offered.place} holds tensors twice: {_listed(twice)}")
    return {name: theirs for name, (theirs,) in named.items()}


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
