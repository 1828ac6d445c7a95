"""The command line: ``mor COMMAND``, a module for each, imported only when it is called."""

from mor.cli.main import main

__all__ = ["main"]
