"""How many bytes of text tokens stand for, which turns nats into bits per byte.

B batch · T tokens of a window
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from mor.data.spelling import visible_bytes

if TYPE_CHECKING:
    from torch import Tensor

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token for one byte, of SentencePiece's byte fallback
_PRINTABLE = set(pre_tokenizers.ByteLevel.alphabet())
_OTHERS = [byte for byte in range(256) if chr(byte) not in _PRINTABLE]
_ALPHABET = {chr(byte): bytes([byte]) for byte in range(256) if chr(byte) in _PRINTABLE} | {
    chr(256 + place): bytes([byte]) for place, byte in enumerate(_OTHERS)
}
"""The byte for each character in which byte-level tokenizers write them."""


class TextBytes(NamedTuple):
    """UTF-8 bytes by token id, as the first token of a document and inside one: there are
    tokenizers that put a space before a document, which is no part of its text. Special tokens, the
    unknown token and ids without a token have 0. visible: without white space."""

    first: np.ndarray
    inside: np.ndarray
    visible: np.ndarray
    end_of_text_id: int

    def of_document(self, ids: Sequence[int]) -> tuple[int, int]:
        """Bytes that the tokens of a whole document spell: all but white space, and that."""
        found = np.asarray(ids, dtype=np.int64)
        visible = int(self.visible[found].sum())
        return visible, int(self.first[found[:1]].sum() + self.inside[found[1:]].sum()) - visible

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
    ids = [i for i in sorted(names) if i not in special | unknown_ids(backend)]
    first, inside, visible = np.zeros((3, max(names) + 1), dtype=np.int64)
    if b'"ByteLevel"' in _state(backend.decoder) + _state(backend.pre_tokenizer):
        texts = [_spelled(names[i], {} if i in added else _ALPHABET) for i in ids]
        first[ids] = inside[ids] = [len(text) for text in texts]
        visible[ids] = [visible_bytes(text) for text in texts]
    elif ids:
        first[ids], inside[ids], visible[ids] = _decoded(backend, ids)
        if has_byte_tokens(backend):
            of_bytes = [i for i in ids if _BYTE.fullmatch(names[i])]
            first[of_bytes] = inside[of_bytes] = 1
            visible[of_bytes] = [visible_bytes(bytes([int(names[i][1:-1], 16)])) for i in of_bytes]
    if backend.decode(backend.encode("a", add_special_tokens=False).ids) == " a":
        spaced = [i for i in ids if backend.decode([i]).startswith(" ")]
        first[spaced] -= 1
    return TextBytes(first, inside, visible, end_of_text_id)


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether the text of tokens is their bytes in a row, and nothing else happens to it."""
    state = _state(backend.decoder)
    return bool(state) and json.loads(state)["type"] == "ByteLevel"


def has_byte_tokens(backend: tokenizers.Tokenizer) -> bool:
    """Whether there are tokens like <0x0A> for single bytes, of SentencePiece's byte fallback."""
    return b'"ByteFallback"' in _state(backend.decoder)


def bytes_of_name(name: str) -> bytes:
    """What a token of a byte-level tokenizer adds to the text. An added token with a character that
    stands for no byte is its own text."""
    found = [_ALPHABET.get(character) for character in name]
    return b"".join(byte for byte in found if byte) if all(found) else name.encode()


def unknown_ids(backend: tokenizers.Tokenizer) -> set[int]:
    """The token that stands for whatever has none, if there is one."""
    model = backend.model
    if isinstance(model, models.Unigram):  # which has no attribute for it
        found = json.loads(_state(model))["unk_id"]
    else:
        name = getattr(model, "unk_token", None)
        found = None if name is None else backend.token_to_id(name)
    return set() if found is None else {found}


def _state(part: object) -> bytes:
    """A decoder or pre-tokenizer with all that is in it, as JSON."""
    return b"" if part is None else part.__getstate__()  # type: ignore[return-value]


def _spelled(name: str, alphabet: Mapping[str, bytes]) -> bytes:
    """A token's text, by its name, in which a character of the alphabet stands for one byte."""
    return b"".join(alphabet.get(character) or character.encode() for character in name)


def _decoded(
    backend: tokenizers.Tokenizer, ids: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """Bytes of each token's text: by itself, after another token, and there without white space."""
    alone = [text.encode() for text in backend.decode_batch([[i] for i in ids])]
    before = next((i for i, t in zip(ids, alone, strict=True) if t.decode().isalnum()), ids[0])
    start = backend.decode([before]).encode()
    after = [text.encode() for text in backend.decode_batch([[before, i] for i in ids])]
    return (
        [len(text) for text in alone],
        [len(text) - len(start) for text in after],
        [visible_bytes(text) - visible_bytes(start) for text in after],
    )
