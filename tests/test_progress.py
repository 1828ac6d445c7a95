"""The progress bar stays in view however narrow the terminal and however long the text."""

import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from mor.progress import ProgressBar

HEALTH = (
    "loss 3.123 · 7,600 tok/s · depth 2.00 (100/67/33%) · entropy 1.00 · dead 0% · agreement 9%"
)


def shown(width, label="train", text=HEALTH, **settings):
    """The lines of the bar as last drawn, without colours."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with ProgressBar(console, label, **settings) as bar:
        bar.update(120, text)
    with console.capture() as capture:
        console.print(bar._live.get_renderable())
    return Text.from_ansi(capture.get()).plain.splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bar_count_and_time_left_are_never_pushed_out(width):
    line, *text = shown(width, total=500, counted=True)
    assert re.fullmatch(r"train ━{4}╸ {15} 120/500 \d:\d\d:\d\d left -:--:--", line)
    assert all(len(part) <= width for part in text)
    assert " ".join(part.strip() for part in text) == HEALTH, "below the bar, nothing cut off"


def test_a_long_label_gives_way_to_the_bar():
    line, *_ = shown(60, label="expert-choice, width large, seed 0", total=500, counted=True)
    assert re.fullmatch(r"expert-… ━{4}╸ {15} 120/500 \d:\d\d:\d\d left -:--:--", line)


def test_a_share_is_a_percentage_and_an_unknown_total_shows_neither():
    (line,) = shown(80, text="", total=480)
    assert "25%" in line and "left" in line
    (line,) = shown(80, text="", total=None)
    assert "%" not in line and "left" not in line


def test_elsewhere_only_notes_are_printed():
    console = Console(file=io.StringIO(), width=80)
    with ProgressBar(console, "train", total=10) as bar:
        bar.update(5, "loss 3")
        bar.note("[b] stays " + "x" * 100)
    assert console.file.getvalue() == "[b] stays " + "x" * 100 + "\n"
