"""What single tokens say, for lists of log-probabilities: a token may be a part of a character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

from mor.data.text_bytes import bytes_of_name
from mor.data.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """Texts of a tokenizer's tokens, as they are inside a text; special ones have their names."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._special = tokenizer.special_token_ids
        self._is_byte_level = tokenizer.is_byte_level
        self._anchor = (tokenizer.encode("a") or [tokenizer.end_of_text_id])[-1:]
        self._before = self._backend.decode(self._anchor, skip_special_tokens=False)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """UTF-8 of a token; an id without a token has none."""
        if (found := self._known.get(token_id)) is None:
            found = self._known[token_id] = self._find(token_id)
        return found

    def text_of(self, token_id: int) -> str:
        """A token as text; ``bytes:\\xe2\\x82`` where it is a part of a character, as OpenAI
        writes it."""
        found = self.bytes_of(token_id)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def _find(self, token_id: int) -> bytes:
        name = self._backend.id_to_token(token_id)
        if name is None or token_id in self._special:
            return (name or "").encode()
        if self._is_byte_level:
            return bytes_of_name(name)
        text = self._backend.decode([*self._anchor, token_id], skip_special_tokens=False)
        if "\ufffd" not in text and text.startswith(self._before):
            return text[len(self._before) :].encode()
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte.group(1), 16)])
        return text.encode()


class Offsets:
    """Where tokens begin in their text, in characters."""

    def __init__(self, texts: TokenTexts, start: int = 0) -> None:
        self._texts, self._place = texts, start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, token_ids: Iterable[int]) -> list[int]:
        """Of tokens that follow those of earlier calls."""
        found = []
        for token_id in token_ids:
            found.append(self._place)
            self._place += len(self._decoder.decode(self._texts.bytes_of(token_id)))
        return found
