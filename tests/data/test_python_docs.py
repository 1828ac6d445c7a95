"""The default corpus: the documentation of Python itself."""

from mor.data.python_docs import python_documents, without_repeats
from mor.data.sources import Document
from mor.files import cache_folder


def test_the_default_corpus_is_pythons_own_prose():
    documents = python_documents()
    names = {d.name for d in documents}
    assert len(names) == len(documents) > 300
    assert {"topic:assert", "module:argparse", "module:math"} <= names
    assert sum(len(d.text) for d in documents) > 1_000_000
    assert len(list(cache_folder().glob("python-*.jsonl"))) == 1
    assert python_documents() == documents, "the kept copy is the same"


def test_no_paragraph_stands_in_two_documents():
    long = "a paragraph that is certainly longer than forty characters"
    documents = [
        Document("a", f"{long}\n\nshort"),
        Document("b", f"short\n\n{long}\n\nown"),
        Document("c", long),
    ]
    assert without_repeats(documents) == [
        Document("a", f"{long}\n\nshort"),
        Document("b", "short\n\nown"),
    ]
