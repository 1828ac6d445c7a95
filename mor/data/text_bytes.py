"""How many bytes of text tokens stand for, which turns nats into bits per byte.

B batch · T tokens of a window
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

if TYPE_CHECKING:
    from torch import Tensor

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token for one byte, of SentencePiece's byte fallback


class TextBytes(NamedTuple):
    """UTF-8 bytes by token id, as the first token of a document and inside one: there are
    tokenizers that put a space before a document, which is no part of its text. Special tokens and
    ids without a token have 0."""

    first: np.ndarray
    inside: np.ndarray
    end_of_text_id: int

    def of(self, tokens_BT: Tensor, targets_BT: Tensor) -> int:
        """Bytes of the text that the targets spell; those below 0 are none. tokens_BT: the token
        before each target."""
        known = targets_BT >= 0
        tokens, targets = tokens_BT[known].numpy(), targets_BT[known].numpy()
        starts = tokens == self.end_of_text_id
        return int(np.where(starts, self.first[targets], self.inside[targets]).sum())


def text_bytes(backend: tokenizers.Tokenizer, end_of_text_id: int) -> TextBytes:
    """Of every token, the text that it adds when it is decoded.

    For a tokenizer that gives back the text it was given, that is its own text, to the byte. Where
    it changes text (lower case, normal forms), bytes are those of the changed text.
    """
    names = {i: name for name, i in backend.get_vocab(with_added_tokens=True).items()}
    added = backend.get_added_tokens_decoder()
    special = {end_of_text_id, *(i for i, token in added.items() if token.special)}
    ids = [i for i in sorted(names) if i not in special]
    first, inside = np.zeros((2, max(names) + 1), dtype=np.int64)
    if b'"ByteLevel"' in _state(backend.decoder) + _state(backend.pre_tokenizer):
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        inside[ids] = [_spelled(names[i], frozenset() if i in added else alphabet) for i in ids]
        first[ids] = inside[ids]
    else:
        first[ids], inside[ids] = _decoded(backend, ids)
        if b'"ByteFallback"' in _state(backend.decoder):
            of_bytes = [i for i in ids if _BYTE.fullmatch(names[i])]
            first[of_bytes] = inside[of_bytes] = 1
    if backend.decode(backend.encode("a", add_special_tokens=False).ids) == " a":
        spaced = [i for i in ids if backend.decode([i]).startswith(" ")]
        first[spaced] -= 1
    return TextBytes(first, inside, end_of_text_id)


def _state(part: object) -> bytes:
    """A decoder or pre-tokenizer with all that is in it, as JSON."""
    return b"" if part is None else part.__getstate__()  # type: ignore[return-value]


def _spelled(name: str, alphabet: set[str] | frozenset[str]) -> int:
    """Bytes of a token's name, in which a character of the alphabet stands for one byte."""
    return sum(1 if character in alphabet else len(character.encode()) for character in name)


def _decoded(backend: tokenizers.Tokenizer, ids: list[int]) -> tuple[list[int], list[int]]:
    """Bytes of each token's text, by itself and after another token."""
    alone = backend.decode_batch([[i] for i in ids])
    before = next((i for i, text in zip(ids, alone, strict=True) if text.isalnum()), ids[0])
    start = len(backend.decode([before]).encode())
    after = backend.decode_batch([[before, i] for i in ids])
    return [len(t.encode()) for t in alone], [len(t.encode()) - start for t in after]
