"""What all commands are: settings whose fields are flags."""

from __future__ import annotations

import inspect
import io
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr
from itertools import pairwise
from typing import Annotated, Any, Self

import tyro
from rich.console import Console
from tyro.conf import PositionalMetavarFromFieldName, arg

from mor.settings import Settings

TEXTS = ("--prompt", "--system", "--text")  # flags for which an empty word means something


class Command(Settings):
    """``run`` does the work; its mistakes are ValueErrors in one line."""

    @classmethod
    def read(cls, arguments: list[str], program: str, *, default: Self | None = None) -> Self:
        """From the command line. Raises ValueError for a value out of bounds, for flags that are
        not there, given twice, empty or without effect."""

        def made(command: Any) -> Any:  # tyro boxes the ValueErrors of a class, not of a function
            return command

        made.__annotations__ = {"command": Annotated[cls, arg(name="")], "return": cls}
        if default is not None:
            made.__defaults__ = (default,)
        given = cls.given(arguments)
        command: Self = parse(
            made,
            arguments,
            program,
            description=description(cls),
            config=(PositionalMetavarFromFieldName,),
        )
        for names, reason in command.without_effect():
            unused = [given[name] for name in names.split() if name in given]
            said = f"{', '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect {reason}"
            if any(written.startswith("--") for written in unused):
                raise ValueError(said)
            if unused:  # of a file, which flags may refine
                warnings.warn(said, stacklevel=2)
        return command

    @classmethod
    def given(cls, arguments: list[str]) -> dict[str, str]:
        """Names of the settings that a person chose, and where each was written. Raises ValueError
        for what was written twice or left empty."""
        found: dict[str, str] = {}
        for before, word in pairwise(["", *arguments]):
            written, equals, value = word.partition("=")
            empty = before not in TEXTS if not word else equals and not value
            if empty and written not in TEXTS:
                raise ValueError(f"{written or before or 'an argument'} is empty; leave it out")
            if not re.match(r"--[a-z]", word):
                continue
            place, _, name = written[2:].replace("-", "_").rpartition(".")
            name = ".".join(filter(None, (place, name.removeprefix("no_"))))
            if name in found:
                raise ValueError(f"{written} is given twice; which of them is meant?")
            found[name] = written
        return found

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Names of settings, with spaces between, and why they have no effect beside the others."""
        yield from ()

    def run(self, console: Console) -> None:
        raise NotImplementedError


def parse(made: Any, arguments: list[str], program: str, **settings: Any) -> Any:
    """What tyro reads from the command line. Raises ValueError with its complaint in a sentence,
    for which it draws a box of many lines."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            found = tyro.cli(made, args=arguments, prog=program, **settings)
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise ValueError(f"{_sentence(said.getvalue())}; see {program} --help") from None
    sys.stderr.write(said.getvalue())  # warnings of the settings
    return found


# What tyro says, and what it means; its own words name Python's types.
_MEANINGS = (
    (r"Error parsing (?:command|made)\S*: (.*)", r"\1"),  # a ValueError of the settings
    (r"Error parsing (\S+): .*?\[?('[^']*'(?:, '[^']*')*)(?:\].*|$)", r"\1 takes KIND, got \2"),
    (r"Error parsing (\S+): .*", r"\1 takes KIND"),
    (r"Missing from [^:]*: (\S+).*", r"\1 is missing"),
    (r"Missing value for argument '([^']*)'.*", r"\1 needs a value"),
    (
        r"invalid choice (.*) for argument '(?:command\.)?(.*?)'.*\((.*)\)",
        r"\2 is one of \3, not \1",
    ),
    (r"Unrecognized options: ([^,]*).*", r"\1 is not known here"),
)


def _sentence(box: str) -> str:
    """The first part of a box in plain words, and the flag that was perhaps meant."""
    lines = [line.strip("│╰╯ ") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if re.match("╭─|(─|-)+$", line)] + [len(lines)]
    said = " ".join(lines[rules[0] + 1 : rules[1]]).rstrip(". ")
    flag = next((line for line in lines if re.match("--[a-z]", line)), "")
    for pattern, meaning in _MEANINGS:
        if re.fullmatch(pattern, said):
            said = re.sub(pattern, meaning, said)
            break
    if said.endswith("is not known here") and flag:
        return f"{said} (did you mean {flag.split()[0]}?)"
    kind = "whole numbers" if "INT" in flag else "numbers" if "FLOAT" in flag else "another value"
    said = re.sub(r"(?<=is one of ).*(?=, not)", _in_order, said)
    return said.replace("KIND", kind)


def _in_order(choices: re.Match[str]) -> str:
    return ", ".join(sorted(set(re.findall(r"'(\w*)'", choices.group())) - {"None"}))


def description(command: type[Command]) -> str:
    """What a command does: its docstring, whose paragraphs the terminal wraps anew."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
