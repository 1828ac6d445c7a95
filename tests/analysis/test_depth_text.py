"""Text by depth: colours where there are some, digits elsewhere."""

import io
from types import SimpleNamespace

from rich.console import Console

from mor.analysis.depth_text import depth_legend, depth_text
from mor.data.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
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
    assert depth_legend(2, plain).plain == "depth  ¹ ²  (after each token)"


def test_with_colours_the_text_stays_as_it_is_and_the_prompt_is_bold():
    coloured = console(force_terminal=True, color_system="standard")
    text = depth_text(TOKENIZER, READ, coloured)
    assert text.plain == "abc\nd"
    styles = {text.plain[span.start]: str(span.style) for span in text.spans}
    assert styles == {"a": "cyan bold", "b": "yellow bold", "c": "green", "\n": "red", "d": "cyan"}
    assert depth_legend(2, coloured).plain == "depth  1  2 "


def test_the_last_token_was_never_read_and_is_dim():
    cut = SimpleNamespace(prompt_ids=READ.prompt_ids, token_ids=[99], depths=[1, 1])
    text = depth_text(TOKENIZER, cut, console(force_terminal=True, color_system="standard"))
    assert str(text.spans[-1].style) == "dim"
