"""mor demo | data | train | sweep | eval | explain | report | generate | convert | bench | costs: a
module for each."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import subcommand

from mor.cli.bench import Bench
from mor.cli.convert import Convert
from mor.cli.data import Data
from mor.cli.demo import Demo
from mor.cli.evaluate import Eval
from mor.cli.explain import Explain
from mor.cli.generate import Generate
from mor.cli.model import Costs
from mor.cli.report import Report
from mor.cli.sweep import Sweep
from mor.cli.train import Train, train_defaults

Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Explain, subcommand("explain")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Costs, subcommand("costs")]
    | Annotated[Sweep, subcommand("sweep")]
)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Mistakes of the user end in one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console(markup=False)  # titles, names and paths may hold brackets
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        if arguments[:1] == ["train"]:
            rest = arguments[1:]
            tyro.cli(Train, args=rest, default=train_defaults(rest), prog="mor train").run(console)
        else:
            tyro.cli(
                Command,
                args=arguments,
                prog="mor",
                description="Mixture-of-Recursions language models.",
            ).run(console)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
