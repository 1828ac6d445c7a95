"""Tables of settings, made of the dataclasses themselves.

Fields, types, defaults, bounds declared in ``Annotated`` types or in a field's metadata, and the
docstring below each field. ``refresh.py`` puts them into the pages.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pkgutil
import textwrap
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mor.model.config import PRESET_NAMES, preset

BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def table(name: str, prefix: str = "") -> str:
    """A Markdown table of a dataclass's plain settings; nested ones have tables of their own.

    name: with its module, such as ``mor.engine.EngineConfig``.
    """
    cls = pkgutil.resolve_name(name)
    hints, notes = get_type_hints(cls, include_extras=True), field_docstrings(cls)
    rows = ["| Setting | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(_plain(hints[field.name])):
            continue
        cells = (
            f"`{prefix}{field.name}`",
            type_name(hints[field.name]) + bounds(field.metadata.values()),
            f"`{_default(field)}`",
            notes.get(field.name, ""),
        )
        rows.append("| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |")
    return "\n".join(rows)


def preset_table() -> str:
    """The shapes that presets give."""
    heads = ("Layers", "Dimension", "Heads", "Key/value heads", "Feed-forward", "Vocabulary")
    names = ("num_layers", "dim", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size")
    rows = [f"| Preset | {' | '.join(heads)} | Longest sequence |", "| --- |" + " ---: |" * 7]
    for name in PRESET_NAMES:
        shape = preset(name)
        figures = (f"{getattr(shape, setting):,}" for setting in (*names, "max_seq_len"))
        rows.append(f"| `{name}` | {' | '.join(figures)} |")
    return "\n".join(rows)


def field_docstrings(cls: type) -> dict[str, str]:
    """The string below each field, which Python itself forgets."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        before.target.id: " ".join(after.value.value.split())
        for before, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


def type_name(hint: Any) -> str:
    """In words, with the bounds that it declares: ``list of `int` ≥ 1``."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return type_name(parts[0]) + bounds(hint.__metadata__)
    if origin is Literal:
        return ", ".join(f"`{choice!r}`" for choice in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(map(type_name, parts))
    if origin is tuple:
        return f"list of {type_name(parts[0])}"
    return "`None`" if hint is type(None) else f"`{getattr(hint, '__name__', hint)}`"


def bounds(constraints: Iterable[Any]) -> str:
    """`` ≥ 1`` and the like, from anything that says gt, ge, lt or le, or collects what does."""
    each = [c for whole in constraints for c in (whole, *getattr(whole, "metadata", ()))]
    found = dict.fromkeys(
        f"{sign} {_number(value)}"
        for constraint in each
        for name, sign in BOUNDS.items()
        if isinstance(value := getattr(constraint, name, None), int | float)
    )
    return " " + ", ".join(found) if found else ""


def _number(value: float) -> str:
    large = abs(value) == 2**63
    return f"{'-' if value < 0 else ''}2^63" if large else f"{value:g}"


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"
