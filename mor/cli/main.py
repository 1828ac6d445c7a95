"""Entry point: find a command by name, run it, and turn mistakes of the user into one line."""

from __future__ import annotations

import io
import os
import sys
from pkgutil import resolve_name
from typing import NamedTuple

import mor
from mor.accessories import plain_warnings
from mor.interruption import EXIT_CODE, leaving_at_second


class Entry(NamedTuple):
    place: str  # module:class
    line: str


COMMANDS = {
    "demo": Entry(
        "mor.cli.demo:Demo", "small models at equal FLOPs, on a text and on a task where depth pays"
    ),
    "data": Entry("mor.cli.data:Data", "tokenize text into shards, or look at them"),
    "train": Entry("mor.cli.train:Train", "train one model"),
    "sweep": Entry("mor.cli.sweep:Sweep", "run a study: a grid of runs, its tables and figures"),
    "runs": Entry("mor.cli.runs:Runs", "list the runs in a folder"),
    "info": Entry("mor.cli.info:Info", "what a run or checkpoint is and how far it got"),
    "compare": Entry("mor.cli.compare:Compare", "runs or checkpoints side by side"),
    "eval": Entry("mor.cli.evaluate:Eval", "loss of a checkpoint, or its scores on benchmarks"),
    "calibrate": Entry(
        "mor.cli.calibrate:Calibrate", "learn what --depth asks of a checkpoint's router"
    ),
    "generate": Entry("mor.cli.generate:Generate", "continue a text with a checkpoint, or chat"),
    "serve": Entry("mor.cli.serve:Serve", "answer over HTTP, as OpenAI's clients expect it"),
    "explain": Entry("mor.cli.explain:Explain", "a page that shows what a model does with a text"),
    "report": Entry("mor.cli.report:Report", "a page of the figures and tables of a run or study"),
    "convert": Entry("mor.cli.convert:Convert", "turn Llama-type models into mor's, or back"),
    "bench": Entry("mor.cli.bench:Bench", "how fast decoding is on this machine"),
    "costs": Entry("mor.cli.costs:Costs", "parameters, FLOPs and memory of a model"),
    "presets": Entry("mor.cli.presets:Presets", "the named model shapes and their sizes"),
}


def main(arguments: list[str] | None = None) -> None:
    """Exit codes: 2 for a user's mistake, 130 for Ctrl-C, 1 if the reader of a pipe is gone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what an encoding lacks must not end the work
    plain_warnings()
    try:
        with leaving_at_second():
            run(sys.argv[1:] if arguments is None else arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # as in `mor runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        raise SystemExit(1) from None
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None


FILE_ERRORS = {
    FileNotFoundError: "there is no {}",
    FileExistsError: "{} is a file, and a folder is needed",
    NotADirectoryError: "{} is a file, or lies below one, and a folder is needed",
    IsADirectoryError: "{} is a folder, and a file is needed",
    PermissionError: "{}: no permission",
}


def in_words(error: Exception) -> str:
    """An error without the system's number for it, and with the file that it is about."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    words = FILE_ERRORS.get(type(error))
    if words and error.filename is not None:
        return words.format(error.filename)
    return f"{error.filename or ''}: {error.strerror}".removeprefix(": ")


def run(arguments: list[str]) -> None:
    name, rest = (arguments or ["--help"])[0], arguments[1:]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"mor {mor.__version__}")
    elif name not in COMMANDS:
        from mor.settings import suggestion

        meant = suggestion(name, COMMANDS)
        raise ValueError(f"mor has no command {name!r}{meant}; mor --help lists them")
    else:
        from rich.console import Console

        command = resolve_name(COMMANDS[name].place).read(rest, f"mor {name}")
        command.run(Console(markup=False))  # titles, names and paths may hold brackets


def overview() -> str:
    lines = [f"  {name:9} {entry.line}" for name, entry in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mor [--help] [--version] COMMAND ...",
            "",
            "Mixture-of-Recursions language models.",
            "",
            *lines,
            "",
            "mor COMMAND --help describes its flags.",
        ]
    )
