"""What commands print: JSON for programs, tables for people."""

import io
import json

import pytest
from rich.console import Console

from mor.cli.show import cell, flag, print_facts, print_json, print_json_rows, print_rows


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234567, "1,234,567"),
        (0.5, "0.5000"),
        (1e6 / 3, "333,333"),
        (512.0, "512"),
        (1234.56, "1,234.6"),
        (3.0, "3.0000"),
        (True, "True"),
        ("a", "a"),
        ([1, 0.25], "1 0.2500"),
    ],
)
def test_cells(value, shown):
    assert cell(value) == shown


def test_one_row_is_an_object_unless_a_list_is_wanted(capsys):
    row = {"a": 1}
    for show, want in ((print_json, row), (print_json_rows, [row])):
        show([row])
        assert json.loads(capsys.readouterr().out) == want
    print_json([row, row])
    assert json.loads(capsys.readouterr().out) == [row, row]


def test_tables_have_a_column_for_each_row_and_facts_a_line_each(capsys):
    console = Console(file=io.StringIO(), width=60)
    print_rows([{"loss": 2.5}, {"loss": 3.5}], False, console, title="Scores")
    print_facts({"model": {"max_seq_len": None}, "none here": {}}, False, console, title="Facts")
    printed = console.file.getvalue()
    assert "Scores" in printed and any(
        "loss" in line and "2.5000" in line and "3.5000" in line for line in printed.splitlines()
    )
    assert any("max seq len" in line and "–" in line for line in printed.splitlines())
    assert any(
        "none here:" in line and line.rstrip().endswith("none") for line in printed.split("\n")
    )
    print_facts({"none here": {}}, True, console, title="Facts")
    assert json.loads(capsys.readouterr().out) == {"none_here": {}}


def test_flags_are_spelt_with_hyphens():
    assert flag("num_recursions") == "--num-recursions"
