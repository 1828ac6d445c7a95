"""Text by depth: colours where there are some, digits elsewhere."""

import io
from types import SimpleNamespace

from rich.console import Console

from mor.analysis.depth_text import depth_legend, depth_text
from mor.data.tokenizer import byte_tokenizer
from mor.model.config import RouterConfig, preset

TOKENIZER = byte_tokenizer()
CONFIG = preset("tiny", num_recursions=2)
READ = SimpleNamespace(
    prompt_ids=TOKENIZER.encode("ab"),
    token_ids=[*TOKENIZER.encode("c\nd"), TOKENIZER.end_of_text_id],
    depths=[1, 2, 12, 3, 1],
)


def console(**settings):
    return Console(file=io.StringIO(), **settings)


def test_without_colours_every_token_has_its_depth_in_digits():
    plain = console(color_system=None)
    assert depth_text(TOKENIZER, READ, plain).plain == "a¹b²c¹²³\nd¹", "and no end of text"
    assert (
        depth_legend(CONFIG.least_depth, CONFIG.num_recursions, plain).plain
        == "depth  ¹ ²  (after each token)"
    )


def test_with_colours_the_text_stays_as_it_is_and_the_prompt_is_bold():
    coloured = console(force_terminal=True, color_system="standard")
    text = depth_text(TOKENIZER, READ, coloured)
    assert text.plain == "abc\nd"
    styles = {text.plain[span.start]: str(span.style) for span in text.spans}
    assert styles == {"a": "cyan bold", "b": "yellow bold", "c": "green", "\n": "red", "d": "cyan"}
    assert depth_legend(CONFIG.least_depth, CONFIG.num_recursions, coloured).plain == "depth  1  2 "


def test_the_last_token_was_never_read_and_is_dim():
    cut = SimpleNamespace(prompt_ids=READ.prompt_ids, token_ids=[99], depths=[1, 1])
    text = depth_text(TOKENIZER, cut, console(force_terminal=True, color_system="standard"))
    assert str(text.spans[-1].style) == "dim"


def test_a_token_without_recursions_is_shown_and_named_in_the_legend():
    config = preset(
        "tiny", num_recursions=2, router=RouterConfig(kind="random", capacities=(0.5, 0.2))
    )
    read = SimpleNamespace(prompt_ids=READ.prompt_ids, token_ids=[99], depths=[0, 1])
    plain = console(color_system=None)
    assert depth_text(TOKENIZER, read, plain).plain.startswith("a⁰b¹")
    assert (
        depth_legend(config.least_depth, config.num_recursions, plain).plain
        == "depth  ⁰ ¹ ²  (after each token)"
    )
    coloured = console(force_terminal=True, color_system="standard")
    styles = [str(span.style) for span in depth_text(TOKENIZER, read, coloured).spans]
    assert styles == ["default bold", "cyan bold", "dim"]
