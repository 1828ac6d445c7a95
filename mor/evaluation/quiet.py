"""lm-eval without its advice, progress bars and questions to git, which would bury a table of
scores."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator

from mor.files import extra

with extra("eval", needed_for="mor eval --tasks"):
    from lm_eval import evaluator


class CutRequests(logging.Filter):
    """Counts lm-eval's notices of requests longer than the context. Only errors pass."""

    count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += record.getMessage().startswith("Combined length of context")
        return record.levelno >= logging.ERROR


@contextlib.contextmanager
def quiet() -> Iterator[CutRequests]:
    """Silence lm-eval's loggers, and its progress bars where there is no terminal; and let it not
    ask git about the folder one happens to be in, whose complaint goes to the terminal."""
    cut = CutRequests()
    library, model = (logging.getLogger(name) for name in ("lm_eval", "lm_eval.models.huggingface"))
    levels = library.level, model.level
    library.setLevel(logging.ERROR)
    model.setLevel(logging.WARNING)
    model.addFilter(cut)
    ask_git = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        with without_bars():
            yield cut
    finally:
        evaluator.get_git_commit_hash = ask_git
        model.removeFilter(cut)
        library.setLevel(levels[0])
        model.setLevel(levels[1])


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Where stderr is not a terminal, hold it back and pass on all but progress bars: lm-eval has
    no switch for them."""
    if sys.stderr.isatty():
        yield
        return
    held = io.StringIO()
    try:
        with contextlib.redirect_stderr(held):
            yield
    finally:
        for line in held.getvalue().split("\n"):
            if line and "\r" not in line:
                print(line, file=sys.stderr)
