"""The prose of Python's own standard library: text that every machine has."""

from __future__ import annotations

import ast
import importlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mor.data.sources import Document
from mor.files import cache_folder, replacing


def python_documents() -> list[Document]:
    """Help topics and docstrings of this Python's standard library, one document per topic and
    module.

    Gathered once per Python version and kept in the user's cache folder.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    kept = cache_folder() / f"python-{version}.jsonl"
    if kept.is_file():
        return [
            Document(**json.loads(line)) for line in kept.read_text(encoding="utf-8").splitlines()
        ]
    documents = without_repeats([*_help_topics(), *_builtin_docstrings(), *_library_docstrings()])
    try:
        with replacing(kept) as unfinished:
            lines = (json.dumps(d._asdict()) + "\n" for d in documents)
            unfinished.write_text("".join(lines), encoding="utf-8")
    except OSError as error:  # a full disk costs a few seconds per run, nothing else
        print(f"note: could not keep the corpus in {kept}: {error}", file=sys.stderr)
    return documents


def without_repeats(documents: list[Document]) -> list[Document]:
    """Drop paragraphs that occur in an earlier document: validation must not hold training text."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = [
            p for p in document.text.split("\n\n") if len(p.strip()) <= 40 or p.strip() not in seen
        ]
        seen |= {p.strip() for p in paragraphs}
        if text := "\n\n".join(paragraphs).strip():
            kept.append(Document(document.name, text))
    return kept


def _help_topics() -> Iterator[Document]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(f"topic:{name}", text.strip())


def _builtin_docstrings() -> Iterator[Document]:
    for name in sorted(
        {"builtins", "math", "itertools", "time", "_io", "_collections", "_functools"}
    ):
        module = importlib.import_module(name)
        texts = [module.__doc__ or ""]
        for _, thing in sorted(vars(module).items()):
            members = vars(thing).values() if isinstance(thing, type) else []
            texts += [
                d
                for d in (getattr(x, "__doc__", None) for x in (thing, *members))
                if isinstance(d, str)
            ]
        yield Document(
            f"module:{name}", "\n\n".join(dict.fromkeys(t.strip() for t in texts if len(t) > 40))
        )


def _library_docstrings() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "pydoc_data",
    }
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skipped & set(parts) or parts[0].startswith("_sysconfigdata"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # files kept broken on purpose, such as templates
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(dict.fromkeys(t for t in texts if t))
        if len(text) > 200:
            yield Document("module:" + ".".join(parts), text)
