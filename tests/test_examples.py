"""Every script in examples/ does what it says, on a small run."""

import importlib.util
import shutil
from pathlib import Path

import pytest

import mor
from mor.data.sources import Document, read_documents

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "run"
    shutil.copytree(ROOT / "tests" / "fixtures" / "old_run", folder)
    return str(folder)


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_and_named_in_the_list():
    tests, listed = Path(__file__).read_text(), (ROOT / "examples" / "README.md").read_text()
    for script in EXAMPLES:
        assert f'example("{script.stem}")' in tests
        assert f"`{script.name} " in listed


def test_python_docs_writes_json_lines_that_mor_reads(tmp_path, capsys, monkeypatch):
    script = example("python_docs")
    some = [Document("topic:a", "Ä text\nof two lines."), Document("module:b", "Another.")]
    monkeypatch.setattr(script, "python_documents", lambda: some)  # all of them take a while
    script.main(tmp_path / "corpus.jsonl")
    assert [d.text for d in read_documents(tmp_path / "corpus.jsonl")] == [d.text for d in some]
    assert "2 documents" in capsys.readouterr().out


def test_train_leaves_a_run_that_loads(tmp_path, capsys):
    example("train").main(str(tmp_path / "run"), steps=2)
    config = mor.load(tmp_path / "run").config
    assert (config.num_recursions, config.kv_strategy) == (4, "hybrid")
    assert "nats per token" in capsys.readouterr().out


def test_depths_shows_what_generate_found(run, capsys):
    example("depths").main(run, "Line")
    lines = capsys.readouterr().out.splitlines()
    _, model, tokenizer = mor.load(run)
    greedy = mor.SamplingParams(max_new_tokens=20, temperature=0)
    result = mor.generate(model, [tokenizer.encode("Line")], greedy)[0]
    assert [int(line[0]) for line in lines[:-1]] == result.depths
    assert lines[-1] == f"mean depth {result.mean_depth:.2f} of 3"


def test_serve_streams_every_token_of_every_request(run, capsys):
    example("serve").main(run, "Line", "the state")
    out = capsys.readouterr().out
    assert [out.count(f"request #{i}: token") for i in (0, 1)] == [12, 12]
    assert out.count(": length, depth") == 2


def test_transformers_continues_as_mor_does(run, capsys):
    pytest.importorskip("transformers")
    example("with_transformers").main(run, "Line")
    _, model, tokenizer = mor.load(run)
    greedy = mor.SamplingParams(max_new_tokens=12, temperature=0)
    result = mor.generate(model, [tokenizer.encode("Line")], greedy)[0]
    assert capsys.readouterr().out.endswith(f"recursions: {result.depths}\n")


def test_explain_to_table_has_a_row_per_token_and_recursion(run, capsys):
    pytest.importorskip("pandas")
    table = example("explain_to_table").main(run, "Line 7: the state")
    _, _, tokenizer = mor.load(run)
    assert len(table) == 3 * len(tokenizer.encode("Line 7: the state"))
    depth = table["taken"].sum() / table["index"].nunique()
    assert f"mean depth {depth:.2f}" in capsys.readouterr().out
