"""What the demo says of its models on text."""

import pytest

from mor.demo.text import TextRow, text_verdict


def text_rows(mean_depth=2.0, **bits_per_byte):
    values = dict.fromkeys(TextRow.__dataclass_fields__, 1.0) | {"mean_depth": mean_depth}
    return [
        TextRow(**values | dict(name=name.replace("_", " "), bits_per_byte_causal=value))
        for name, value in bits_per_byte.items()
    ]


@pytest.mark.parametrize(
    ("one_pass", "words"),
    [(2.2, "depth pays on this text"), (2.09, "within noise"), (2.0, "One pass is better")],
)
def test_the_verdict_on_text_follows_from_the_numbers(one_pass, words):
    said = text_verdict(text_rows(vanilla=2.3, recursive=2.4, MoR=2.1, one_pass=one_pass))
    assert words in said and said.index("MoR 2.100") < said.index("recursive 2.400")


def test_the_verdict_on_text_knows_a_router_that_does_not_use_its_depth():
    said = text_verdict(text_rows(1.02, vanilla=2.3, recursive=2.4, MoR=2.1, one_pass=2.2))
    assert "1.02 recursions" in said and "depth pays" not in said
