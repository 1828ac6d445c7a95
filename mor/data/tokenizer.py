"""Text to token ids and back: bytes, a BPE trained here, or any Hugging Face tokenizer.

All three are one thing, a ``tokenizers`` pipeline, so a saved one loads in transformers as well.

One rule for special tokens: a document is text, and what is written in it is never a special token,
even if it reads like one. Prompts and what chat templates write are *marked up*: there, the text of
a special token is that token.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mor.data.long_pieces import in_short_pieces
from mor.data.spelling import spelling
from mor.data.text_bytes import (
    TextBytes,
    bytes_of_name,
    has_byte_tokens,
    is_byte_level,
    text_bytes,
    unknown_ids,
)
from mor.files import check_links, extra, naming, parse_json
from mor.hub_access import asking_the_hub
from mor.run_folder import RunFolder

END_OF_TEXT = "<|endoftext|>"
_SAMPLE = (
    "  Größe 日本語 don't \t\n\n def f(x): return x**2 # 1234567 naïve CO₂ 🙂 e\u0301 A\u00a0B "
    + END_OF_TEXT
)
GENERATION = "generation_config.json"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_UNUSUAL = ("日", "ж", "🛑")
# Files beside tokenizer.json that transformers reads: special tokens, chat templates, limits, and
# the tokens that end a text with the model's sampling defaults.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    GENERATION,
)


class Tokenizer:
    """Equal documents have equal ids, whatever they are read from: settings for batches and for
    training that the backend brings (truncation, padding, dropout, sampling) are turned off."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end_of_text: str = END_OF_TEXT,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """files: texts of a Hugging Face tokenizer's other files; :meth:`save` writes them back."""
        self.backend, self.end_of_text = _for_documents(backend), end_of_text
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_text}
        self.files = dict(files or {"tokenizer_config.json": json.dumps(settings, indent=2)})
        end_id = backend.token_to_id(end_of_text)
        if end_id is None:
            raise ValueError(f"the tokenizer has no token {end_of_text!r} to end a document with")
        self.end_of_text_id: int = end_id
        self.end_ids = self._end_ids()
        """Tokens that end a text when a model writes them."""

    def _end_ids(self) -> tuple[int, ...]:
        """Those of generation_config.json, which then names all of them, and end-of-text."""
        if GENERATION not in self.files:
            return (self.end_of_text_id,)
        values = parse_json(self.files[GENERATION], GENERATION)
        with naming(GENERATION):
            special = special_ids(values)
        given = special.get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        ends = tuple(dict.fromkeys((*ids, self.end_of_text_id)))
        if ends != tuple(ids):
            special["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
        if values != (settled := values | special):
            self.files[GENERATION] = json.dumps(settled, indent=2)
        return ends

    @cached_property
    def vocab_size(self) -> int:
        """The largest id and one: ids may have gaps."""
        return max(self.backend.get_vocab().values()) + 1

    def remarks(self) -> list[str]:
        """What one may not expect of it: ids without a token, text without tokens."""
        found = []
        if (count := self.backend.get_vocab_size()) != self.vocab_size:
            found.append(
                f"the tokenizer has {count:,} tokens with ids up to {self.vocab_size - 1:,}; a "
                f"model needs {self.vocab_size:,} embeddings for it"
            )
        if lost := [text for text in _UNUSUAL if not self._has_tokens_for(text)]:
            found.append(
                f"the tokenizer has no tokens for some text, such as {', '.join(lost)}; it is left "
                "out, becomes an unknown token or is an error"
            )
        return found

    def _has_tokens_for(self, text: str) -> bool:
        try:
            return not spelling(self, [text], self.encode_documents([text])).lost
        except ValueError:
            return False

    @property
    def has_tokens_for_all(self) -> bool:
        """Whether it loses no text, by examples of what others lose."""
        return all(map(self._has_tokens_for, _UNUSUAL))

    @property
    def fingerprint(self) -> str:
        """A hash of the vocabulary and a sample text's tokens: equal for equal tokenizers."""
        ids = self.encode(_SAMPLE)
        known = json.dumps([sorted(self.backend.get_vocab().items()), self.end_of_text_id, ids])
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    def check_fits(self, vocab_size: int) -> None:
        """Raise ValueError if a model with this many embeddings lacks one for some token, or for
        one that its generation_config.json names."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer has ids up to {self.vocab_size - 1}, the model embeddings for "
                f"0..{vocab_size - 1}: they do not belong together; give the model its own "
                "tokenizer"
            )
        if GENERATION in self.files:
            with naming(GENERATION):
                special_ids(parse_json(self.files[GENERATION], GENERATION), vocab_size)

    @cached_property
    def text_bytes(self) -> TextBytes:
        """Bytes of text that each token stands for."""
        return text_bytes(self.backend, self.end_of_text_id)

    @cached_property
    def markup_ids(self) -> set[int]:
        """Tokens that are no text where a text is marked up; what is unknown is text."""
        return self.special_token_ids - unknown_ids(self.backend)

    @cached_property
    def special_token_ids(self) -> set[int]:
        """Tokens that give no text when they are decoded."""
        added = self.backend.get_added_tokens_decoder()
        return {i for i, token in added.items() if token.special}

    @cached_property
    def is_byte_level(self) -> bool:
        return is_byte_level(self.backend)

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to the text, for a byte-level tokenizer."""
        if (known := self._bytes.get(token_id)) is None:
            name = self.backend.id_to_token(token_id)
            if name is None or token_id in self.special_token_ids:
                name = ""
            known = self._bytes[token_id] = bytes_of_name(name)
        return known

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def has_byte_tokens(self) -> bool:
        return has_byte_tokens(self.backend)

    def encode(self, text: str) -> list[int]:
        """Ids of a text that may be marked up, as a chat template does. Raises ValueError if the
        text cannot be written as UTF-8."""
        return self._encoding(text).ids

    def _encoding(self, text: str, *, add_special_tokens: bool = False) -> tokenizers.Encoding:
        _check_unicode(text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to continue, which may be marked up, with the beginning-of-text token if
        the tokenizer adds one (Llama 2 and 3 do), without the end that others add."""
        return [*self._beginning, *self.encode(text)]

    @cached_property
    def _beginning(self) -> list[int]:
        found = self._encoding("a", add_special_tokens=True)
        marks = zip(found.ids, found.special_tokens_mask, strict=True)
        return [i for i, _ in takewhile(lambda mark: mark[1], marks)]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each document, in which nothing is a special token. Raises ValueError for a text
        that cannot be written as UTF-8."""
        # Not kept in the backend's file, so not in a copy of it that another process gets either.
        self._of_documents.encode_special_tokens = True
        try:
            found = self._of_documents.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library has no narrower one
            for text in texts:
                _check_unicode(text)
            raise ValueError(f"the tokenizer cannot encode this text: {error}") from error
        return [encoding.ids for encoding in found]

    @cached_property
    def _of_documents(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.backend.to_str())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; the end-of-text token gives nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def encode_with_pieces(self, text: str) -> tuple[list[int], list[str]]:
        """Ids of a marked-up text, and the piece of it that each stands for. Together the pieces
        are the text, special tokens included; a character of several tokens appears with the last
        of them."""
        encoding = self._encoding(text)
        spans = [*encoding.offsets, (len(text), len(text))]
        ends = [min(end, following) for (_, end), (following, _) in pairwise(spans)]
        bounds = [0, *ends[:-1], len(text)]
        return encoding.ids, [text[start:end] for start, end in pairwise(bounds[: len(spans)])]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each id adds to the decoded text, from ids alone. Special tokens add nothing."""
        pieces, done = [], ""
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[:end])
            if text.endswith("\ufffd") and end < len(ids):
                pieces.append("")
                continue
            pieces.append(text[len(done) :])
            done = text
        return pieces

    def _for_another_model(self) -> Tokenizer:
        """Without the sampling defaults of the model it came with; the ids stay."""
        if GENERATION in self.files:
            values = parse_json(self.files[GENERATION], GENERATION)
            ids = {name: value for name, value in values.items() if name.endswith("token_id")}
            self.files[GENERATION] = json.dumps(ids, indent=2)
        self.check_fits(self.vocab_size)
        return self

    def save(self, folder: Path) -> None:
        self.backend.save(str(folder / "tokenizer.json"))
        for name, text in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a Hugging Face tokenizer directory. Raises ValueError if it is none, or damaged."""
        folder = Path(folder)
        check_links(folder)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} holds no tokenizer.json{_other_forms(folder)}")
        found = sorted(path for pattern in COMPANIONS for path in folder.glob(pattern))
        with naming(folder):
            files = {str(path.relative_to(folder)): _read(path) for path in found}
            end = _end_of_text(files)
            backend = _backend(folder / "tokenizer.json")
            return cls(backend, end_of_text=end, files=files)

    @classmethod
    def find(cls, name: str) -> Tokenizer:
        """'bytes', a directory with a tokenizer (such as a checkpoint or a run) or a hub name."""
        if name == "bytes":
            return byte_tokenizer()
        if Path(name).exists() or name.count("/") > 1 or name.startswith(("/", ".")):
            found = cls.load(next(reversed(RunFolder(Path(name)).checkpoints()), Path(name)))
            return found._for_another_model()
        with extra("hf", needed_for=f"there is no directory {name!r}, and a tokenizer of the hub"):
            from transformers import AutoTokenizer
        try:
            with asking_the_hub(name):
                theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            return cls.from_transformers(theirs)
        except OSError as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{name!r} is neither a directory nor a tokenizer of the hub: {first}"
            ) from error

    @classmethod
    def from_transformers(cls, theirs: Any) -> Tokenizer:
        """From a transformers tokenizer, settings included. Raises ValueError for a slow one."""
        if not theirs.is_fast:
            raise ValueError(
                f"{type(theirs).__name__} has no tokenizer.json form; mor reads fast tokenizers "
                "only"
            )
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            return cls.load(folder)

    def to_transformers(self) -> Any:
        """The same tokenizer as transformers reads it from a checkpoint."""
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder))
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def special_ids(
    values: Mapping[str, Any], vocab_size: int | None = None
) -> dict[str, int | list[int] | None]:
    """The tokens that begin, end and pad texts, as far as a model's settings name them.

    vocab_size: that of the model, where it is known. Several tokens may end a text. Old models pad
    with -1, which means none. Raises ValueError for what is no token.
    """
    found: dict[str, int | list[int] | None] = {}
    for name in SPECIAL:
        given = values.get(name)
        if (name, given) in (("pad_token_id", -1), ("eos_token_id", [])):
            given = None
        ids = given if isinstance(given, list) and name == "eos_token_id" else [given]
        if given is not None and not all(
            type(i) is int and i >= 0 and (vocab_size is None or i < vocab_size) for i in ids
        ):
            ends = "" if vocab_size is None else str(vocab_size - 1)
            raise ValueError(f"{name}={given!r} is not a token of the model: ids are 0..{ends}")
        if name in values:
            found[name] = given
    return found


def _for_documents(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Without what a tokenizer.json may keep of the batches or the training it was used for."""
    backend.no_truncation()
    backend.no_padding()
    for sampling in ("dropout", "alpha", "nbest_size"):  # of BPE; of Unigram
        if getattr(backend.model, sampling, None) is not None:
            setattr(backend.model, sampling, None)
    return backend


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, from a command line that is not UTF-8
        raise ValueError(f"the text is not valid UTF-8: {text[:40]!r}") from None


def _backend(file: Path) -> tokenizers.Tokenizer:
    try:
        backend = _for_documents(tokenizers.Tokenizer.from_file(str(file)))
        found = backend.encode(_SAMPLE.removesuffix(END_OF_TEXT), add_special_tokens=False)
    except Exception as error:  # the library has no narrower one
        raise ValueError(f"{file.name} is damaged: {error}; restore a copy") from None
    if not found.ids:
        raise ValueError(f"{file.name} is damaged: text gives no tokens; restore a copy")
    return backend


def _other_forms(folder: Path) -> str:
    """What to do about a folder without tokenizer.json."""
    if not folder.is_dir():
        return ": there is no such folder; give 'bytes', a tokenizer directory or a hub name"
    for name in ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"):
        if (folder / name).is_file():
            return (
                f" but {name}; write one with transformers: "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
    return "; copy there the one that belongs to this model"


def _read(file: Path) -> str:
    with naming(file.name):
        try:
            return file.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"it cannot be read ({error.strerror})") from None


def _end_of_text(files: Mapping[str, str]) -> str:
    """The end-of-text token that a tokenizer's other files name."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= parse_json(files.get(name, "{}"), name)
    end = settings.get("eos_token") or END_OF_TEXT
    end = end.get("content") if isinstance(end, dict) else end
    if not isinstance(end, str):
        raise ValueError(f"eos_token is not text but {end!r}")
    return end


def byte_tokenizer() -> Tokenizer:
    """256 bytes and the end-of-text token."""
    vocab = {
        character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    return _finish(backend, use_regex=False)


def train_bpe(texts: Iterable[str | tuple[str, str]], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of ``vocab_size`` tokens, bytes and end-of-text included.

    texts: or documents, (name, text). See :func:`mor.data.long_pieces.in_short_pieces` for those
    without white space.
    """
    if vocab_size < 257:
        raise ValueError(f"a byte-level BPE needs at least 257 tokens, got vocab_size={vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    documents = (t if isinstance(t, tuple) else (f"text {i}", t) for i, t in enumerate(texts, 1))
    backend.train_from_iterator(in_short_pieces(documents), trainer)
    return _finish(backend, use_regex=True)


def _finish(backend: tokenizers.Tokenizer, *, use_regex: bool) -> Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)
