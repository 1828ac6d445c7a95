"""Documents -> tokens -> batches.

The default corpus needs no download: the help topics and docstrings that every Python carries.
Batches are a pure function of (seed, position), so a run continues exactly where it stopped.

B batch · T sequence length
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mor.tokenizer import Tokenizer, byte_tokenizer, train_bpe


class Document(NamedTuple):
    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str | None = None
    """A .txt or .jsonl file. None: the prose of Python's own standard library."""
    text_field: str = "text"
    tokenizer: str = "bpe"
    """'bytes', 'bpe' (trained on the training documents), or a tokenizer directory."""
    vocab_size: int = 2048
    """Size of the trained BPE."""
    validation_share: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(f"data.validation_share must lie between 0 and 1, got {self.validation_share}")


@dataclass(frozen=True)
class DataState:
    """Sequences handed out so far; all that is needed to continue."""

    position: int = 0


class Batch(NamedTuple):
    tokens_BT: Tensor
    targets_BT: Tensor


@dataclass(frozen=True)
class TokenData:
    """A token stream, every document closed by end-of-text. num_bytes: UTF-8 bytes of its text."""

    tokens: Tensor
    num_bytes: int
    num_documents: int

    def windows(self, seq_len: int) -> int:
        """Sequences of seq_len tokens with their targets that the stream holds."""
        return (len(self.tokens) - 1) // seq_len

    def window(self, index: int, seq_len: int) -> Tensor:
        return self.tokens[index * seq_len : index * seq_len + seq_len + 1]

    def batches(
        self, batch_size: int, seq_len: int, *, seed: int, state: DataState
    ) -> Iterator[tuple[Batch, DataState]]:
        """Endless batches from ``state`` on; every epoch visits all windows in an order of its own."""
        per_epoch = self.windows(seq_len)
        if per_epoch < 1:
            raise ValueError(f"the data holds {len(self.tokens)} tokens, less than one sequence of {seq_len + 1}")
        orders: dict[int, Tensor] = {}
        position = state.position
        while True:
            rows = []
            for place in range(position, position + batch_size):
                epoch, index = divmod(place, per_epoch)
                if epoch not in orders:
                    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                    orders = {epoch: torch.randperm(per_epoch, generator=generator)}
                rows.append(self.window(int(orders[epoch][index]), seq_len))
            position += batch_size
            block = torch.stack(rows).long()
            yield Batch(block[:, :-1].contiguous(), block[:, 1:].contiguous()), DataState(position)


@dataclass(frozen=True)
class Corpus:
    tokenizer: Tokenizer
    train: TokenData
    validation: TokenData


def load_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Read, split and tokenize. A given tokenizer (from a checkpoint) replaces the configured one."""
    documents = read_documents(Path(config.path), config.text_field) if config.path else python_documents()
    train, validation = split_documents(documents, config.validation_share)
    tokenizer = tokenizer or _make_tokenizer(config, train)
    return Corpus(tokenizer, tokenize(train, tokenizer), tokenize(validation, tokenizer))


def _make_tokenizer(config: DataConfig, train: list[Document]) -> Tokenizer:
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    if config.tokenizer == "bpe":
        return train_bpe((d.text for d in train), config.vocab_size)
    return Tokenizer.load(config.tokenizer)


def tokenize(documents: list[Document], tokenizer: Tokenizer) -> TokenData:
    ids = tokenizer.encode_batch([d.text for d in documents])
    end = [tokenizer.end_of_text_id]
    stream = torch.cat([torch.tensor(document + end, dtype=torch.int32) for document in ids])
    return TokenData(stream, sum(len(d.text.encode()) for d in documents), len(documents))


def split_documents(documents: list[Document], validation_share: float) -> tuple[list[Document], list[Document]]:
    """Train and validation documents, chosen by a hash of the name: adding one moves no other."""

    def draw(document: Document) -> float:
        return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8]) / 2**64

    ordered = sorted(documents, key=draw)
    count = sum(draw(d) < validation_share for d in documents)
    if len(documents) < 2:
        raise ValueError("the data holds a single document; training needs at least one more to validate on")
    count = min(max(count, 1), len(documents) - 1)
    held_out = {d.name for d in ordered[:count]}
    return [d for d in documents if d.name not in held_out], [d for d in documents if d.name in held_out]


def read_documents(path: Path, text_field: str = "text") -> list[Document]:
    """Documents of a .jsonl file, or of a .txt file cut at blank lines into pieces of about 4,000 characters."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a .txt or .jsonl file")
    if path.suffix == ".jsonl":
        documents = list(_read_jsonl(path, text_field))
    elif path.suffix == ".txt":
        documents = list(_read_text(path))
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}; give a .txt or .jsonl file")
    if not documents:
        raise ValueError(f"{path} holds no text")
    return documents


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not valid JSON: {error}") from None
            if text_field not in record:
                raise ValueError(f"{path}:{number} has no field {text_field!r}; it has {', '.join(record)}")
            if record[text_field].strip():
                yield Document(f"{path.name}:{number}", record[text_field])


def _read_text(path: Path, size: int = 4000) -> Iterator[Document]:
    piece: list[str] = []
    number = 0
    for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) >= size:
            yield Document(f"{path.name}:{number}", "\n\n".join(piece).strip())
            piece, number = [], number + 1
    if any(p.strip() for p in piece):
        yield Document(f"{path.name}:{number}", "\n\n".join(piece).strip())


def python_documents() -> list[Document]:
    """Help topics and docstrings of this Python's standard library, one document per topic and module.

    Gathered once per Python version and kept in the user's cache folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mor"
    kept = cache / f"python-{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}.jsonl"
    if kept.is_file():
        return [Document(**json.loads(line)) for line in kept.read_text(encoding="utf-8").splitlines()]
    documents = without_repeats([*_help_topics(), *_builtin_docstrings(), *_library_docstrings()])
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text("".join(json.dumps(d._asdict()) + "\n" for d in documents), encoding="utf-8")
        unfinished.replace(kept)
    except OSError as error:  # a read-only home costs a few seconds per run, nothing else
        print(f"note: could not keep the corpus in {cache}: {error}", file=sys.stderr)
    return documents


def without_repeats(documents: list[Document]) -> list[Document]:
    """Documents without paragraphs that an earlier one has: else validation would hold training text."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = [p for p in document.text.split("\n\n") if len(p.strip()) <= 40 or p.strip() not in seen]
        seen |= {p.strip() for p in paragraphs}
        if text := "\n\n".join(paragraphs).strip():
            kept.append(Document(document.name, text))
    return kept


def _help_topics() -> Iterator[Document]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(f"topic:{name}", text.strip())


def _builtin_docstrings() -> Iterator[Document]:
    for name in sorted({"builtins", "math", "itertools", "time", "_io", "_collections", "_functools"}):
        module = importlib.import_module(name)
        texts = [module.__doc__ or ""]
        for _, thing in sorted(vars(module).items()):
            members = vars(thing).values() if isinstance(thing, type) else []
            texts += [d for d in (getattr(x, "__doc__", None) for x in (thing, *members)) if isinstance(d, str)]
        yield Document(f"module:{name}", "\n\n".join(dict.fromkeys(t.strip() for t in texts if len(t) > 40)))


def _library_docstrings() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
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
