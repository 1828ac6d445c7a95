"""What all commands are: settings whose fields are flags."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Self

import tyro
from rich.console import Console
from tyro.conf import PositionalMetavarFromFieldName, arg

from mor.settings import Settings


class Command(Settings):
    """``run`` does the work; its mistakes are ValueErrors in one line."""

    @classmethod
    def read(cls, arguments: list[str], program: str, *, default: Self | None = None) -> Self:
        """From the command line. Raises ValueError for a value out of bounds."""

        def made(command: Any) -> Any:  # tyro boxes the ValueErrors of a class, not of a function
            return command

        made.__annotations__ = {"command": Annotated[cls, arg(name="")], "return": cls}
        if default is not None:
            made.__defaults__ = (default,)
        command: Self = tyro.cli(
            made,
            args=arguments,
            prog=program,
            description=description(cls),
            config=(PositionalMetavarFromFieldName,),
        )
        return command

    def run(self, console: Console) -> None:
        raise NotImplementedError


def description(command: type[Command]) -> str:
    """What a command does: its docstring, whose paragraphs the terminal wraps anew."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
