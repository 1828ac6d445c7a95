"""The house's own rules that no linter knows."""

import ast
import re
from pathlib import Path

import pytest

import mor

PACKAGE = Path(mor.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
SUFFIXED = re.compile(r"_?[a-z]\w*_([A-Z][A-Z0-9]*)")
TESTS = Path(__file__).parent
WITHOUT_TESTS = {  # settings alone, names that moved, names passed on, and the way in
    "__init__",
    "__main__",
    "config",
    "data/config",
    "generate",
    "hf",
    *(f"{path.parent.name}/__init__" for path in PACKAGE.glob("*/__init__.py")),
}
OF_SEVERAL_MODULES = {
    "benchmarks",
    "built_in",
    "causality",
    "data/same_ids",
    "deepen_benchmarks",
    "docs",
    "engine/budgets",
    "examples",
    "flat_tasks",
    "model/exits",
    "no_code_from_files",
    "parity",
    "public_interface",
    "server/clients",
    "server/depth",
    "training/deepening",
    "style",
}
# Buffers of routers, named in every checkpoint; factors of adapters, as everyone names them.
ON_DISK = {"threshold_R", "bias_R", "need_V", "lora_A", "lora_B"}


def suffixed_names(tree):
    """Names of the code that end in a shape suffix, such as ``tokens_BT``, and the suffixes."""
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    names |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    names |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    found = (SUFFIXED.fullmatch(name) for name in names)
    return {match.group(): match.group(1) for match in found if match}


def legend_letters(docstring):
    """Letters that the last paragraph of a docstring explains: ``B rows · T columns``."""
    entries = (docstring or "").split("\n\n")[-1].replace("\n", " ").split("·")
    allowed = r"\s*[A-Z] [^.]+" if len(entries) > 1 else r"[A-Z] [^.:]{,40}"
    if not all(re.fullmatch(allowed, entry) for entry in entries):
        return set()
    return {entry.split()[0] for entry in entries}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_shape_suffixes_have_two_axes_or_more_and_a_legend_in_their_file(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names, explained = suffixed_names(tree), legend_letters(ast.get_docstring(tree))
    assert [n for n, axes in names.items() if len(axes) == 1 and n not in ON_DISK] == []
    used = {letter for axes in names.values() for letter in axes if letter.isalpha()}
    assert used == explained, f"missing: {used - explained}, not used: {explained - used}"


def test_every_module_has_one_test_file_and_every_test_file_its_module():
    modules = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in MODULES}
    modules = modules - {"analysis/page/__init__"} | {"analysis/page", "server/page"}
    files = (path.relative_to(TESTS).with_suffix("") for path in TESTS.rglob("test_*.py"))
    tested = {path.with_name(path.name.removeprefix("test_")).as_posix() for path in files}
    assert modules - WITHOUT_TESTS - tested == set(), "modules without a test file"
    assert tested - OF_SEVERAL_MODULES - modules == set(), "test files without a module"
    assert modules >= WITHOUT_TESTS and not WITHOUT_TESTS & tested, "exceptions that are none"
