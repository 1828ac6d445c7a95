"""Text to token ids and back: bytes, a BPE trained here, or any Hugging Face tokenizer.

All three are one thing, a ``tokenizers`` pipeline, so a saved one loads in transformers as well.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mor.files import extra

END_OF_TEXT = "<|endoftext|>"
_SAMPLE = (
    "  Größe 日本語 don't \t\n\n def f(x): return x**2 # 1234567 naïve CO₂ 🙂 e\u0301 A\u00a0B "
    + END_OF_TEXT
)
# Files beside tokenizer.json that transformers reads: special tokens, chat templates, limits.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


class Tokenizer:
    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end_of_text: str = END_OF_TEXT,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """files: texts of a Hugging Face tokenizer's other files; :meth:`save` writes them back."""
        self.backend, self.end_of_text = backend, end_of_text
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_text}
        self.files = dict(files or {"tokenizer_config.json": json.dumps(settings, indent=2)})
        end_id = backend.token_to_id(end_of_text)
        if end_id is None:
            raise ValueError(f"the tokenizer has no token {end_of_text!r} to end a document with")
        self.end_of_text_id: int = end_id

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        """A hash of the vocabulary and a sample text's tokens: equal for equal tokenizers."""
        known = json.dumps(
            [sorted(self.backend.get_vocab().items()), self.end_of_text_id, self.encode(_SAMPLE)]
        )
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Raises ValueError if the text cannot be written as UTF-8."""
        return self._encoding(text).ids

    def _encoding(self, text: str, *, add_special_tokens: bool = False) -> tokenizers.Encoding:
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:  # lone surrogates, from a command line that is not UTF-8
            raise ValueError(f"the text is not valid UTF-8: {text[:40]!r}") from error

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of a text to continue, with the beginning-of-text token if the tokenizer adds one
        (Llama 2 and 3 do)."""
        return self._encoding(text, add_special_tokens=True).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; the end-of-text token gives nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def encode_with_pieces(self, text: str) -> tuple[list[int], list[str]]:
        """Ids, and the piece of ``text`` that each stands for. Together the pieces are the text,
        special tokens included; a character of several tokens appears with the last of them."""
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

    def save(self, folder: Path) -> None:
        self.backend.save(str(folder / "tokenizer.json"))
        for name, text in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a Hugging Face tokenizer directory."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(
                f"{folder} holds no tokenizer.json; give 'bytes', 'bpe', a tokenizer directory or "
                "a hub name"
            )
        found = sorted(path for pattern in COMPANIONS for path in folder.glob(pattern))
        files = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in found}
        special = json.loads(files.get("special_tokens_map.json", "{}"))
        end = (special | json.loads(files.get("tokenizer_config.json", "{}"))).get(
            "eos_token"
        ) or END_OF_TEXT
        end = end["content"] if isinstance(end, dict) else end
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return cls(backend, end_of_text=end, files=files)

    @classmethod
    def find(cls, name: str) -> Tokenizer:
        """'bytes', a directory with a tokenizer (such as a checkpoint) or a hub name."""
        if name == "bytes":
            return byte_tokenizer()
        if Path(name).exists() or name.count("/") > 1 or name.startswith(("/", ".")):
            return cls.load(name)
        with extra("hf", needed_for=f"there is no directory {name!r}, and a tokenizer of the hub"):
            from transformers import AutoTokenizer
        try:
            return cls.from_transformers(
                AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            )
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


def byte_tokenizer() -> Tokenizer:
    """256 bytes and the end-of-text token."""
    vocab = {
        character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    return _finish(backend, use_regex=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of ``vocab_size`` tokens, bytes and end-of-text included."""
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
    backend.train_from_iterator(texts, trainer)
    return _finish(backend, use_regex=True)


def _finish(backend: tokenizers.Tokenizer, *, use_regex: bool) -> Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)
