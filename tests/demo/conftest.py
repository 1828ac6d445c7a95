"""A quick demo, run once."""

import contextlib
import io
import json

import pytest

from mor.cli import main


@pytest.fixture(scope="session")
def shown(tmp_path_factory):
    """The folder of a quick demo, the lines that it printed, and its results."""
    out, printed = tmp_path_factory.mktemp("demo") / "demo", io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["demo", "--quick", "--out", str(out), "--json"])
    *lines, last = printed.getvalue().rstrip().splitlines()
    return out, lines, json.loads(last)
