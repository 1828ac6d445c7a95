"""The house's own rules that no linter knows."""

import ast
import re
from pathlib import Path

import pytest

import mor

PACKAGE = Path(mor.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
SUFFIXED = re.compile(r"[a-z]\w*_([A-Z][A-Z0-9]*)")


def used_letters(tree):
    """Letters of shape suffixes, such as B and T of ``tokens_BT``, in names that the code uses."""
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    names |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    found = (SUFFIXED.fullmatch(name) for name in names)
    return {letter for match in found if match for letter in match.group(1) if letter.isalpha()}


def legend_letters(docstring):
    """Letters that the last paragraph of a docstring explains: ``B rows · T columns``."""
    entries = (docstring or "").split("\n\n")[-1].replace("\n", " ").split("·")
    if not all(re.fullmatch(r"\s*[A-Z] [^.:]+", entry) for entry in entries):
        return set()
    return {entry.split()[0] for entry in entries}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_shape_suffix_is_in_the_legend_of_its_file_and_none_besides(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used, explained = used_letters(tree), legend_letters(ast.get_docstring(tree))
    assert used == explained, f"missing: {used - explained}, not used: {explained - used}"
