"""Training and validation data of a run: from files, prepared shards or a task, tokenized."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mor.data.config import BPE, BPE_VOCAB_SIZE, DataConfig
from mor.data.manifest import is_prepared, read_manifest
from mor.data.problems import PREFIX, parse_task, task_tokenizer
from mor.data.python_docs import python_documents
from mor.data.sources import Document, read_documents
from mor.data.spelling import Spelling, spells
from mor.data.split import held_out, held_out_documents, utf8_bytes
from mor.data.stream import Fingerprint, Part, Shard, TaskData, TokenData, Windows
from mor.data.tokenizer import Tokenizer, train_bpe
from mor.data.word_problems import WORDS_PREFIX, InTokens, parse_word_task


@dataclass(frozen=True)
class Corpus:
    tokenizer: Tokenizer
    train: Windows
    validation: Windows

    def fingerprint(self) -> Fingerprint:
        """What tells this corpus from others, by dotted names such as train.tokens: equal for equal
        tokens, wherever they lie. Reads the checksums of prepared data from its manifest."""
        found: Fingerprint = {"tokenizer": self.tokenizer.fingerprint}
        for split, data in (("train", self.train), ("validation", self.validation)):
            found |= {f"{split}.{name}": value for name, value in data.fingerprint().items()}
        return found


def what_changed(before: Mapping[str, str | int], now: Mapping[str, str | int]) -> str:
    """How a corpus differs from the one that ``before`` is the fingerprint of, in words; empty if
    it does not."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    counts = [name for name in changed if not name.endswith("sha256")]
    if changed and not counts:
        return "the text is another of the same length, or in another order"
    return ", ".join(
        f"{name} was {_shown(before, name)}, is {_shown(now, name)}" for name in counts
    )


def _shown(fingerprint: Mapping[str, str | int], name: str) -> str:
    value = fingerprint.get(name, "unknown")
    return f"{value:,}" if isinstance(value, int) else value


def load_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Read, split and tokenize text, or open prepared data or a task.

    tokenizer: that of a checkpoint, which replaces the configured one; prepared data must have been
    made with it. Raises ValueError for data that cannot be read or split, and where the
    configuration says otherwise than the data.
    """
    if tokenizer is None:
        _check_effect(config)
    found = _load_corpus(config, tokenizer)
    if tokenizer is None and config.validation_path:
        _check_apart(found, config)
    return found


def _load_corpus(config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    if config.path and config.path.startswith(PREFIX):
        return _task_corpus(config.path)
    if config.path and config.path.startswith(WORDS_PREFIX):
        return _words_corpus(config, tokenizer)
    if config.path and is_prepared(config.path):
        return _prepared_corpus(config, tokenizer)
    documents = (
        read_documents(config.path, config.text_field) if config.path else python_documents()
    )
    if config.validation_path:
        train, validation = documents, None
    else:
        train, validation = split_documents(documents, config.validation_share, of=config.share_of)
    if tokenizer is None:
        tokenizer = _make_tokenizer(config, train)
        for remark in tokenizer.remarks():
            warnings.warn(remark, stacklevel=2)
    if validation:
        held_out = tokenize(validation, tokenizer, "the validation text")
    else:
        held_out = _validation(config, tokenizer)
    return Corpus(tokenizer, tokenize(train, tokenizer, "the training text"), held_out)


_COMPARED = 64  # validation documents; the longest, of whose lengths there are few


def _check_apart(corpus: Corpus, config: DataConfig) -> None:
    """Raise ValueError if the validation text is training text; warn if some of it is."""
    train, held_out = corpus.train, corpus.validation
    assert isinstance(train, TokenData) and isinstance(held_out, TokenData)
    longest = sorted(_document_spans(held_out), key=lambda span: span[2] - span[1])[-_COMPARED:]
    texts = {_document(*span) for span in longest}
    lengths = {stop - start for _, start, stop in longest}
    both = {_document(*span) for span in _document_spans(train, lengths)} & texts
    if len(both) == len(texts):
        raise ValueError(
            f"all documents of {config.validation_path} are in the training text, "
            f"{config.path or 'the default corpus'}, too: a loss on them says nothing of other "
            "text. Leave out data.validation_path to hold out a share, or give other text"
        )
    if both:
        text = (
            f"{len(both)} of the {len(texts)} longest documents of {config.validation_path} are in "
            "the training text, too: the validation loss is too low by what was learned by heart"
        )
        warnings.warn(text, stacklevel=3)


def _document_spans(
    data: TokenData, lengths: set[int] | None = None
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Tokens of a part, and where each document begins and ends in them. lengths: only of these."""
    for part in data.parts:
        tokens, ends = part.unchecked() if isinstance(part, Shard) else part
        starts = np.concatenate([[0], ends[:-1]])
        wanted = np.isin(ends - starts, list(lengths)) if lengths else np.ones(len(ends), bool)
        for place in np.flatnonzero(wanted):
            yield tokens, int(starts[place]), int(ends[place])


def _document(tokens: np.ndarray, start: int, stop: int) -> bytes:
    return tokens[start:stop].astype(np.uint32).tobytes()


def vocab_size(config: DataConfig) -> int:
    """Size of the vocabulary that :func:`load_corpus` would return, without reading the data. A BPE
    that is yet to be trained may come out smaller, if the text has too few different pieces."""
    if config.path and config.path.startswith(PREFIX):
        return len(parse_task(config.path).words())
    if config.path and config.path.startswith(WORDS_PREFIX):
        return _found_tokenizer(config).vocab_size
    if config.path and is_prepared(config.path):
        return Tokenizer.load(config.path).vocab_size
    if (config.tokenizer or BPE) == BPE:
        return config.vocab_size or BPE_VOCAB_SIZE
    return Tokenizer.find(config.tokenizer or BPE).vocab_size


def _check_effect(config: DataConfig) -> None:
    """Raise ValueError for settings that the data contradicts; warn of those without effect."""
    is_task = (config.path or "").startswith((PREFIX, WORDS_PREFIX))
    prepared = not is_task and config.path is not None and is_prepared(config.path)
    asked = {name: getattr(config, name) for name in ("tokenizer", "vocab_size")}
    given = {name: value for name, value in asked.items() if value is not None}
    in_words = (config.path or "").startswith(WORDS_PREFIX)
    if in_words:
        given.pop("tokenizer", None)
    if is_task and (given or config.validation_path):
        named = ", ".join(f"data.{name}" for name in given or ["validation_path"])
        has = "its own validation" if in_words else "its own tokenizer and validation"
        raise ValueError(f"{config.path} has {has}: leave out {named}")
    if prepared:
        _check_prepared(config)
    elif config.vocab_size and (config.tokenizer or BPE) != BPE:
        raise ValueError(
            f"data.vocab_size={config.vocab_size} is the size of a trained BPE; leave it out with "
            f"data.tokenizer={config.tokenizer!r}, or choose 'bpe'"
        )
    unused = set()
    if is_task or prepared or config.validation_path:
        unused.add("validation_share")
    if (config.path is None or is_task or prepared) and not config.validation_path:
        unused.add("text_field")
    for name in sorted(unused):
        if getattr(config, name) != DataConfig.__dataclass_fields__[name].default:
            place = config.path or "the default corpus"
            warnings.warn(f"data.{name} has no effect on {place} with these settings", stacklevel=4)


def _check_prepared(config: DataConfig) -> None:
    """Raise ValueError if another tokenizer is asked for than the one that the data has."""
    has = read_manifest(Path(config.path or ""))["settings"]["tokenizer"]
    if config.vocab_size not in (None, has["vocab_size"]):
        raise ValueError(
            f"data.vocab_size={config.vocab_size}, but the tokenizer of {config.path} has "
            f"{has['vocab_size']} tokens; leave it out, or prepare the data again"
        )
    if config.tokenizer is None:
        return
    same = (
        has["asked"].startswith(BPE + " ")
        if config.tokenizer == BPE
        else Tokenizer.find(config.tokenizer).fingerprint == has["fingerprint"]
    )
    if not same:
        raise ValueError(
            f"data.tokenizer={config.tokenizer!r}, but {config.path} was prepared with "
            f"{has['asked']!r}; leave it out, or prepare the data again"
        )


def _task_corpus(path: str) -> Corpus:
    task = parse_task(path)
    return Corpus(
        task_tokenizer(task.words()), TaskData(task, 1 << 16, 1 << 20), TaskData(task, 0, 512)
    )


def _words_corpus(config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    task = parse_word_task(config.path or "")
    tokenizer = tokenizer or _found_tokenizer(config)
    train, held_out = (InTokens(task, tokenizer, held_out=held) for held in (False, True))
    return Corpus(tokenizer, TaskData(train, 1 << 16, 1 << 20), TaskData(held_out, 0, 512))


def _found_tokenizer(config: DataConfig) -> Tokenizer:
    if (config.tokenizer or BPE) == BPE:
        raise ValueError(
            f"{config.path} is text for a model that can read: start from one with --init-from "
            "CHECKPOINT, or name a tokenizer with data.tokenizer ('bytes', a directory or hub name)"
        )
    return Tokenizer.find(config.tokenizer or BPE)


def _prepared_corpus(config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    folder = Path(config.path or "")
    tokenizer = tokenizer or Tokenizer.load(folder)
    train = open_shards(folder, "train", tokenizer)
    if config.validation_path:
        return Corpus(tokenizer, train, _validation(config, tokenizer))
    if "validation" not in read_manifest(folder)["splits"]:
        raise ValueError(
            f"{folder} has no validation split; set data.validation_path, or prepare it with "
            "--validation-share 0.005"
        )
    return Corpus(tokenizer, train, open_shards(folder, "validation", tokenizer))


def _validation(config: DataConfig, tokenizer: Tokenizer) -> TokenData:
    return load_tokens(config.validation_path or "", tokenizer, config.text_field)


def load_tokens(
    path: str | Path, tokenizer: Tokenizer, text_field: str = "text", split: str | None = None
) -> TokenData:
    """All text of a file or folder, or a split of prepared data; None is :func:`held_out_split`.

    Raises ValueError for a split that is not there.
    """
    if is_prepared(path):
        return open_shards(path, split or held_out_split(path), tokenizer)
    if split:
        raise ValueError(f"{path} is not prepared data, so it has no split {split!r}")
    return tokenize(read_documents(path, text_field), tokenizer, str(path))


def held_out_split(path: str | Path) -> str:
    """The validation split of prepared data, or the only one."""
    splits = read_manifest(Path(path))["splits"]
    return "validation" if "validation" in splits else "train"


def open_shards(folder: str | Path, split: str, tokenizer: Tokenizer) -> TokenData:
    """Map the shards of prepared data. Raises ValueError if another tokenizer made them."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    made_by = manifest["settings"]["tokenizer"]
    if made_by["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"{folder} was prepared with the tokenizer {made_by['asked']!r} "
            f"({made_by['fingerprint']}), not with the one of this model or run "
            f"({tokenizer.fingerprint}); prepare it again with --tokenizer MODEL_OR_RUN"
        )
    if split not in manifest["splits"]:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(manifest['splits'])}")
    found = manifest["splits"][split]
    dtype = manifest["settings"]["dtype"]
    shards = [_find_shard(folder, shard, dtype, tokenizer) for shard in found["shards"]]
    unread = CHECKED_AT_ONCE
    for shard in shards:
        if unread > 0:
            shard.check()
        unread -= shard.num_tokens
    is_spelt = _is_spelt(found.get("spelling"), tokenizer, f"the {split} split of {folder}")
    counts = found["documents"], found["bytes"]
    return TokenData(shards, *counts, tokenizer.text_bytes, is_spelt)


def _is_spelt(recorded: dict[str, Any] | None, tokenizer: Tokenizer, name: str) -> bool:
    """Whether prepared tokens spell their text, with a warning if they do not."""
    if recorded is not None:
        found = Spelling.from_dict(recorded)
        remark, is_spelt = found.remark(name), found.is_exact
    elif is_spelt := tokenizer.has_tokens_for_all:
        remark = ""
    else:
        remark = (
            f"{name} was prepared by mor 0.1.0, which did not count the text that a tokenizer has "
            "no tokens for; prepare it again to have bits per byte"
        )
    if remark:
        warnings.warn(remark, stacklevel=4)
    return is_spelt


CHECKED_AT_ONCE = 1 << 27  # tokens; the shards after these are checked when they are first read


def _find_shard(folder: Path, shard: dict[str, Any], dtype: str, tokenizer: Tokenizer) -> Shard:
    file = folder / f"{shard['name']}.bin"
    expected = shard["tokens"] * np.dtype(dtype).itemsize
    if not file.is_file() or file.stat().st_size != expected:
        raise ValueError(
            f"{file} is missing or not {expected} bytes long; delete {folder} and prepare it again"
        )
    if not (ends := file.with_suffix(".ends.npy")).is_file():
        raise ValueError(f"{ends} is missing; delete {folder} and prepare it again")
    modified = max(file.stat().st_mtime_ns, ends.stat().st_mtime_ns)
    recorded = shard.get("sha256", "")
    return Shard(file, dtype, shard["tokens"], tokenizer.vocab_size, modified, recorded)


def _make_tokenizer(config: DataConfig, train: list[Document]) -> Tokenizer:
    if (config.tokenizer or BPE) == BPE:
        return train_bpe(train, config.vocab_size or BPE_VOCAB_SIZE)
    return Tokenizer.find(config.tokenizer or BPE)


def tokenize(documents: list[Document], tokenizer: Tokenizer, name: str = "the text") -> TokenData:
    """name: what the documents are, in words. Raises ValueError if the tokenizer cannot read them,
    and warns of what it loses."""
    texts = [d.text for d in documents]
    ids = tokenizer.encode_documents(texts)
    is_spelt = spells(tokenizer, texts, ids, name)
    end = [tokenizer.end_of_text_id]
    tokens = np.concatenate([np.array(document + end, dtype=np.uint32) for document in ids])
    ends = np.cumsum([len(document) + 1 for document in ids], dtype=np.int64)
    num_bytes = sum(utf8_bytes(d.text) for d in documents)
    parts = [Part(tokens, ends)]
    return TokenData(parts, len(documents), num_bytes, tokenizer.text_bytes, is_spelt)


def split_documents(
    documents: list[Document],
    validation_share: float,
    *,
    of: Literal["bytes", "documents"] = "bytes",
) -> tuple[list[Document], list[Document]]:
    """Training and validation documents; see :func:`mor.data.split.held_out`. Warns if
    the share cannot be had."""
    if len(documents) < 2:
        raise ValueError(
            "the data holds a single document; training needs at least one more to validate on"
        )
    names, sizes = [d.name for d in documents], [utf8_bytes(d.text) for d in documents]
    if of == "documents":
        chosen = held_out_documents(names, validation_share)
    else:
        chosen, divided = held_out(names, sizes, validation_share)
        if miss := divided.miss(validation_share):
            warnings.warn(miss, stacklevel=3)
    pairs = list(zip(documents, chosen, strict=True))
    return [d for d, held in pairs if not held], [d for d, held in pairs if held]
