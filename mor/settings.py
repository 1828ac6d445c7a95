"""Settings from files and flags: frozen dataclasses made of plain values, with every mistake
named."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """A (nested) frozen dataclass from plain values, lists for tuples.

    Raises ValueError for an unknown key, with a suggestion, for a missing one and for a value of
    another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} is made of a table of settings, got {values!r}")
    known, hints = {f.name: f for f in fields(cls)}, get_type_hints(cls)
    made = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{cls.__name__} has no setting {key!r}{suggestion(key, known)}")
        nested = _nested_type(known[key])
        if nested is not None and isinstance(value, Mapping):
            value = from_dict(nested, value)
        made[key] = tuple(value) if isinstance(value, list) else value
        if not fits(made[key], hints[key]):
            raise ValueError(
                f"{cls.__name__}.{key} must be {str(known[key].type).replace('tuple', 'list')}, "
                f"got {value!r}"
            )
    if missing := [name for name, f in known.items() if name not in made and _is_required(f)]:
        raise ValueError(f"{cls.__name__} needs {' and '.join(missing)}")
    return cls(**made)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as settings go: whole numbers are floats, Literals check
    themselves."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind is tuple:
        return isinstance(value, tuple) and all(fits(v, parts[0]) for v in value)
    if kind is dict:
        return isinstance(value, Mapping) and all(fits(v, parts[1]) for v in value.values())
    if kind is Literal or hint is Any:
        return True
    return isinstance(value, float | int if hint is float else kind or hint)


def _is_required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _nested_type(f: dataclasses.Field) -> type | None:
    made = f.default_factory() if callable(f.default_factory) else f.default
    return type(made) if dataclasses.is_dataclass(made) else None


def suggestion(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def default_of(config: Any, name: str) -> Any:
    return type(config).__dataclass_fields__[name].default


def check_choices(config: Any) -> None:
    """Literal fields hold one of their values; dataclasses themselves do not check."""
    hints = _literal_choices(type(config))
    for name, choices in hints.items():
        value = getattr(config, name)
        if value not in choices:
            options = ", ".join(repr(c) for c in choices if c is not None)
            close = suggestion(str(value), [c for c in choices if c])
            raise ValueError(f"{name}={value!r} is not known{close}; choose from {options}")


def _literal_choices(cls: type) -> dict[str, tuple[Any, ...]]:
    found = {}
    for name, hint in get_type_hints(cls).items():
        parts = get_args(hint) if type(None) in get_args(hint) else (hint,)
        literals = [
            v
            for part in parts
            if getattr(part, "__origin__", None) is Literal
            for v in get_args(part)
        ]
        if literals:
            found[name] = (*literals, *([None] if type(None) in parts else []))
    return found
