"""Settings: frozen dataclasses that declare what they take, so that a wrong value is refused where
it is written.

pydantic checks types and bounds, in Python as in a file or a flag; this module makes it strict and
says what is wrong in one line. An exported model ships this file, so it needs nothing but pydantic.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Self, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, Strict, ValidationError, validate_call
from pydantic.dataclasses import dataclass

T = TypeVar("T")
Called = TypeVar("Called", bound=Callable[..., Any])

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""What fits into a signed 64-bit integer."""
Some = Annotated[tuple[T, ...], Field(min_length=1)]
"""One value or more."""
Listed = Annotated[T, Strict(False)]
"""A tuple that may be given as a list, as in files: ``Listed[tuple[int, ...]]``."""

_CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,)
)
class Settings:
    """Base of all settings: subclasses become frozen, keyword-only dataclasses that check
    themselves.

    prefix: what leads to the settings in a run's file, for messages (``router`` for
    ``router.alpha``). Whole numbers are accepted as floats and tables as nested settings; any other
    wrong type, nan, infinity and unknown names raise ValueError, as do the relations between
    settings that a subclass checks in ``__post_init__``.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls, prefix: str = "") -> None:
        dataclass(cls, frozen=True, kw_only=True, config=_CONFIG)
        check: Callable[..., None] = cls.__init__

        @functools.wraps(check)
        def init(self: Settings, **values: Any) -> None:
            with _in_plain_words(values, cls, prefix):
                check(self, **values)

        cls.__init__ = init  # type: ignore[assignment, method-assign]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From plain values, as a file holds them; lists for tuples, tables for nested settings."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{cls.__name__} is made of a table of settings, got {values!r}")
        return cls(**values)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable[[Any], Any]) -> Any:
        return handler(source) | {"strict": False}  # so that a table is taken for an instance


def checked(function: Called) -> Called:
    """Check the arguments of a function against its annotations, as strictly as settings."""
    check = validate_call(config=_CONFIG)(function)
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*arguments: Any, **values: Any) -> Any:
        values |= dict(zip(names, arguments, strict=False))
        with _in_plain_words(values):
            return check(**values)

    return call  # type: ignore[return-value]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings under dotted names, tuples as the lists that files hold."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def suggestion(word: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# What a value must be, by pydantic's type of error, where its own words are for programmers.
_ALLOWED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "dataclass_type": "a table of settings",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}


@contextmanager
def _in_plain_words(
    values: Mapping[Any, Any], cls: type | None = None, prefix: str = ""
) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        found: dict[tuple[Any, ...], list[Any]] = {}  # errors by place
        for each in error.errors():
            found.setdefault(_place(each, values), []).append(each)
        deepest = {
            place: errors
            for place, errors in found.items()
            if not any(other[: len(place)] == place != other for other in found)
        }
        problems = (_problem(place, errors, cls, prefix) for place, errors in deepest.items())
        raise ValueError("; ".join(problems)) from None


def _place(error: Any, values: Any) -> tuple[Any, ...]:
    """Keys that lead to a wrong value, without the names of union branches between them."""
    place = []
    for key in error["loc"]:
        inside = key in values if isinstance(values, Mapping) else isinstance(key, int)
        if inside and isinstance(values, Mapping | list | tuple):
            place.append(key)
            values = values[key]
    missing = error["type"].startswith("missing")
    return (*place, error["loc"][-1]) if missing else tuple(place)


def _problem(place: tuple[Any, ...], errors: list[Any], cls: type | None, prefix: str) -> str:
    """What is wrong with one value; several errors are the branches of a union."""
    error = errors[0]
    steps = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in (prefix, *place))
    name = "".join(steps).strip(".")
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"].startswith("missing"):
        return f"{name} is missing"
    if error["type"] == "unexpected_keyword_argument":
        return f"{name} is not a setting{suggestion(place[-1], _names_at(cls, place[:-1]))}"
    allowed = " or ".join(dict.fromkeys(map(_allowed, errors)))
    choices = re.findall(r"'([^']*)'", allowed)
    if error["type"] in ("too_short", "too_long"):
        return f"{name} must be {allowed}, got a list of {len(error['input'])}"
    return f"{name} must be {allowed}, got {error['input']!r}{suggestion(error['input'], choices)}"


def _allowed(error: Any) -> str:
    words: str = _ALLOWED.get(error["type"], error["msg"].removeprefix("Input should be "))
    words = words.format(**error.get("ctx", {})) if error["type"] in _ALLOWED else words
    words = words.replace("greater than or equal to", "at least")
    return words.replace("less than or equal to", "at most")


def _names_at(cls: Any, place: tuple[Any, ...]) -> list[str]:
    for key in place:
        cls = cls.__pydantic_fields__[key].annotation
    return list(cls.__pydantic_fields__)
