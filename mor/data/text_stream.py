"""The text of tokens that come one by one: what may be shown now, up to the first stop string.

However the tokens are fed, what comes out is ``tokenizer.decode`` of all of them, cut before the
first stop string. Held back are characters whose bytes are not all there yet, and what may be the
beginning of a stop string. A token costs the same wherever in a text it stands.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

from mor.data.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token for one byte, of SentencePiece's byte fallback


class TextStream:
    """stop: the text ends before the first of these that is complete; of several that the same
    character completes, before the longest. ``stopped`` is that one; then nothing more comes out.

    Raises ValueError for an empty one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise ValueError("a stop string must not be empty; leave it out")
        self.stop = tuple(stop)
        self.stopped: str | None = None
        self._text: _Text = (_Bytes if tokenizer.is_byte_level else _Window)(tokenizer)
        self._held = ""  # the end of the text so far, if a stop string may begin with it

    def feed(self, ids: Sequence[int], *, may_stop: bool = True) -> str:
        """What is to be shown after these further tokens. may_stop: whether stop strings that these
        tokens complete end the text."""
        if not self.stop:
            return "".join(map(self._text.feed, ids))
        shown = []
        for token_id in ids:
            new = self._text.feed(token_id)
            shown.append(self._show(new, may_stop))
            if may_stop and self.stopped is None and (waiting := self._text.waiting):
                self._look_ahead(waiting, shown)
        return "".join(shown)

    def end(self) -> str:
        """The rest, once there are no more tokens."""
        rest = self._show(self._text.end(), may_stop=True) + self._held
        self._held = ""
        return rest

    def _show(self, new: str, may_stop: bool) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + new
        if may_stop and (start := self._first_stop(text)) is not None:
            self._held = ""
            return text[:start]
        end = len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[end:]
        return text[:end]

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string begins that a character after those held back completes first."""
        found = [
            (start + len(stop), start)
            for stop in self.stop
            if (start := text.find(stop, max(0, len(self._held) - len(stop) + 1))) >= 0
        ]
        if not found:
            return None
        end, start = min(found)
        self.stopped = text[start:end]
        return start

    def _look_ahead(self, waiting: str, shown: list[str]) -> None:
        """Stop where text that further bytes could still change would be a stop string now."""
        text = self._held + waiting
        if (start := self._first_stop(text)) is not None:
            shown.append(text[:start])
            self._held = ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that a stop string begins with, but for the whole."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


class _Text(Protocol):
    """What each token adds to the text. waiting: what follows it if there are no more tokens, as
    far as that is whole characters."""

    waiting: str

    def feed(self, token_id: int) -> str: ...

    def end(self) -> str: ...


class _Bytes:
    """Of a byte-level tokenizer: the bytes of all tokens, in a row."""

    waiting = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes_of(token_id))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """Of any other tokenizer: what a token adds to the text of the one before it, which is all that
    decoders look at. But tokens of single bytes, if all those in a row are not UTF-8, are errors
    each; so they wait for one of another kind."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._row: list[int] = []
        self.waiting = ""
        self._decoder: codecs.IncrementalDecoder | None = None  # of the row; None: not UTF-8

    def feed(self, token_id: int) -> str:
        name = self._tokenizer.backend.id_to_token(token_id)
        if name is None or token_id in self._tokenizer.special_token_ids:
            return ""
        if self._tokenizer.has_byte_tokens and _BYTE.fullmatch(name):
            self._wait(token_id, bytes.fromhex(name[3:5]))
            return ""
        new = self._added([*self._row, token_id])
        self._before, self._row, self.waiting = [token_id], [], ""
        return new

    def end(self) -> str:
        new = self._added(self._row)
        self._row, self.waiting = [], ""
        return new

    def _wait(self, token_id: int, byte: bytes) -> None:
        if not self._row:
            self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._row.append(token_id)
        if self._decoder is not None:
            try:
                self.waiting += self._decoder.decode(byte)
            except UnicodeDecodeError:
                self._decoder, self.waiting = None, ""

    def _added(self, ids: list[int]) -> str:
        decode = self._tokenizer.decode
        return decode([*self._before, *ids])[len(decode(self._before)) :] if ids else ""
