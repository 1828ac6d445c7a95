"""README and docs tell the truth: their code runs, their commands parse, their names exist."""

import importlib
import json
import re
import shlex
import shutil
import sqlite3
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
import tyro
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser

import mor.cli

ROOT = Path(__file__).parents[1]
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *SITE]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"]

sys.path.insert(0, str(ROOT / "docs" / "scripts"))
refresh, settings_tables, study_tables = map(
    importlib.import_module, ("refresh", "settings_tables", "study_tables")
)


def blocks(language):
    """(name, code) of every fenced block of a language."""
    reader = Sybil(parsers=[CodeBlockParser(language, evaluator=lambda _: None)])
    for page in PAGES:
        for found in reader.parse(page).examples():
            yield f"{page.relative_to(ROOT)}:{found.line}", str(found.parsed)


def commands():
    """Lines that a reader types, put together where they go on after a backslash."""
    for name, code in (*blocks("bash"), *blocks("console")):
        lines = code.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        yield from ((name, line) for line in lines if line.strip())


def mor_commands():
    for name, line in commands():
        words = shlex.split(line, comments=True)
        if words[0] == "mor":
            arguments = words[1:]
        elif "mor" in words:  # torchrun ... -m mor train ...
            arguments = words[words.index("mor") + 1 :]
        else:
            continue
        yield pytest.param(arguments, id=f"{name} {' '.join(arguments[:2])}")


def parse(arguments, monkeypatch):
    """The command line reads the arguments and runs nothing. Raises AssertionError if it cannot."""
    monkeypatch.setenv("WORLD_SIZE", "1")  # as torchrun has it
    parsed, real = [], tyro.cli

    def only_parse(*args, **settings):
        made = real(*args, **settings)
        if hasattr(made, "run"):
            parsed.append(made)
            object.__setattr__(made, "run", lambda console: None)  # also where it is frozen
        return made

    monkeypatch.setattr(tyro, "cli", only_parse)
    try:
        mor.cli.main(arguments)
    except SystemExit as end:
        raise AssertionError(f"mor {shlex.join(arguments)} ends with {end.code}") from None
    assert parsed, f"mor {shlex.join(arguments)} was not parsed by tyro"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a small run, text and a study's table at the paths that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "tests" / "fixtures" / "old_run", folder / "runs" / "mor")
    (folder / "corpus.txt").write_text("The state is 3 and the next is 4.\n" * 20)
    (folder / "runs" / "studies" / "gate").mkdir(parents=True)
    with sqlite3.connect(folder / "runs" / "studies" / "gate" / "results.sqlite") as database:
        database.execute("create table runs (variant, seed, validation_nll)")
        database.execute("insert into runs values ('paper', 0, 0.153)")
    return folder


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in blocks("python")])
def test_python_blocks_run(code, workplace, monkeypatch, capsys):
    if "transformers" in code:
        pytest.importorskip("transformers")
    monkeypatch.chdir(workplace)
    exec(compile(code, "block", "exec"), {"__name__": "block"})
    if "print(" in code:
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("arguments", list(mor_commands()))
def test_mor_commands_parse(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)  # some name a file of the repository
    parse(arguments, monkeypatch)


def test_the_pages_have_code_to_test_and_wrong_commands_are_found(monkeypatch):
    assert len(list(blocks("python"))) >= 8 and len(list(mor_commands())) >= 40
    for wrong in (["train", "--no-such-flag"], ["nonsense"], ["train", "--steps", "many"]):
        with pytest.raises(AssertionError, match="ends with 2"):
            parse(wrong, monkeypatch)


def test_make_targets_exist():
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    text = "\n".join(page.read_text() for page in (*PAGES, *OTHERS))
    named = re.findall(r"(?:`|^    )make ([\w-]+)", text, flags=re.MULTILINE)
    assert {"demo", "test", "docs"} <= set(named) <= set(known)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_links_exist(page):
    text = refresh.MARKED.sub("", page.read_text())  # tables say what code and results say
    rooms = "benchmarks|configs|docs|examples|mor|studies|tests"
    named = re.findall(rf"(?<![\w/.])(?:{rooms})/[\w./-]+\.(?:py|toml|jsonl?|csv|md|svg)\b", text)
    assert [path for path in named if not (ROOT / path).is_file()] == []
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_picture_of_the_demo_is_that_of_its_results():
    drawn = ROOT / "benchmarks" / "results" / "demo-cpu-2026-11-26" / "task.png"
    assert (ROOT / "docs" / "images" / "demo-task.png").read_bytes() == drawn.read_bytes()


def test_the_tables_of_the_demo_are_those_of_its_results():
    rows = json.loads((ROOT / "benchmarks/results/demo-cpu-2026-11-26.json").read_text())
    page = (ROOT / "docs" / "results" / "demo.md").read_text()
    for row in rows["text"]["rows"]:
        numbers = row["params_non_embedding"], row["tokens"], row["kv_bytes_per_token"]
        for number in (*(f"{n:,.0f}" for n in numbers), f"{row['bits_per_byte_causal']:.3f}"):
            assert f" {number} |" in page
    for row in rows["task"]["rows"]:
        spans = [fmean(row["answers_right_by_hops"][i : i + 4]) for i in range(0, 16, 4)]
        cells = [str(row["effective_layers"]), f"{row['tokens']:,}", *(f"{x:.0%}" for x in spans)]
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_names_exist(page):
    for name in set(re.findall(r"\bmor\.[a-z_]\w*(?:\.\w+)*", page.read_text())):
        parts = name.split(".")
        found = importlib.import_module("mor")
        for i, part in enumerate(parts[1:], start=2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:i]))
            found = getattr(found, part)


@dataclass(frozen=True)
class AtLeast:
    ge: int


@dataclass(frozen=True)
class Collected:
    metadata: tuple[AtLeast, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    steps: Annotated[int, AtLeast(1)] = 5
    """How many."""
    form: Literal["paper", "residual"] | None = None
    seed: Annotated[int, Collected((AtLeast(-(2**63)),))] | None = 0
    shares: tuple[float, ...] = field(default=(), metadata={"bound": SimpleNamespace(gt=0, le=1)})


def test_settings_table_has_types_bounds_defaults_and_docstrings():
    assert settings_tables.table(f"{__name__}.Sample", "x.").splitlines()[2:] == [
        "| `x.steps` | `int` ≥ 1 | `5` | How many. |",
        "| `x.form` | `'paper'`, `'residual'` or `None` | `None` |  |",
        "| `x.seed` | `int` ≥ -2^63 or `None` | `0` |  |",
        "| `x.shares` | list of `float` > 0, ≤ 1 | `()` |  |",
    ]


def test_the_tables_of_the_pages_are_those_of_code_and_results():
    tables = 0
    for page in SITE:
        text = page.read_text()
        emptied, count = refresh.MARKED.subn(r"\1\4", text)
        assert refresh.refreshed(emptied) == text, f"{page}: run python docs/scripts/refresh.py"
        tables += count
    assert tables >= 24


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        ("-0.2", "0.1", "no significant difference, n = 3"),
        ("0.1", "0.2", "higher NLL"),
        ("-0.2", "-0.1", "lower NLL"),
    ],
)
def test_a_study_claims_a_difference_only_where_the_interval_leaves_out_0(low, high, words):
    row = {"seeds": "3", "difference": low, "difference_low": low, "difference_high": high}
    assert study_tables.verdict(row) == words


def test_arguments_of_docstrings_get_a_line_each():
    docstrings = importlib.import_module("docstrings")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="api.md"))
    html = "<p>tokens_BT: ids of a :func:<code>pack</code>. top_k, top_p: cuts. Raises OSError.</p>"
    assert docstrings.on_page_content(html, page=page) == (
        "<p><code>tokens_BT</code>: ids of a <code>pack</code>."
        "<br><code>top_k, top_p</code>: cuts.<br>Raises OSError.</p>"
    )
