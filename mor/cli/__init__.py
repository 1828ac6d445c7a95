"""The command line: ``mor COMMAND``, a module for each, imported only when it is called."""

try:
    from mor.cli.main import main
except KeyboardInterrupt:  # before there is anything else to catch it
    raise SystemExit(130) from None

__all__ = ["main"]
