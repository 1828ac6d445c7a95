"""The text of tokens that come one by one: what may be shown now, up to the first stop string.

However the tokens are fed, what comes out is ``tokenizer.decode`` of all of them, cut before the
first stop string. Held back are characters whose bytes are not all there yet, and what may be the
beginning of a stop string. A token costs the same wherever in a text it stands.
"""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
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
        self.stopped: str | None = None
        self._stops = _stops(tuple(stop)) if stop else None
        self._state = 0
        self._text: _Text = (_Bytes if tokenizer.is_byte_level else _Window)(tokenizer)
        self._held = ""  # the end of the text so far, if a stop string may begin with it

    def feed(self, ids: Sequence[int], *, may_stop: bool = True) -> str:
        """What is to be shown after these further tokens. may_stop: whether stop strings that these
        tokens complete end the text."""
        if self._stops is None:
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
        if self._stops is None:
            return new
        text = self._held + new
        self._state, found = self._stops.follow(self._state, new, may_stop)
        if found is not None:
            return self._stop_in(text, *found)
        end = len(text) - self._stops.begun[self._state]
        self._held = text[end:]
        return text[:end]

    def _stop_in(self, text: str, rest: int, length: int) -> str:
        """The text before a stop string, ``rest`` characters after which it ends."""
        end = len(text) - rest
        self.stopped, self._held = text[end - length : end], ""
        return text[: end - length]

    def _look_ahead(self, waiting: str, shown: list[str]) -> None:
        """Stop where text that further bytes could still change would be a stop string now."""
        assert self._stops is not None
        _, found = self._stops.follow(self._state, waiting, True)
        if found is not None:
            shown.append(self._stop_in(self._held + waiting, *found))


class _Stops:
    """Stop strings as an automaton (Aho and Corasick, 1975), which takes a character in the same
    time for one string as for thousands.

    A state is the longest end of the text that a stop string begins with. begun: its length,
    complete strings left out, unless they begin another.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._complete = [0]  # length of the longest stop string that is complete there
        depth = [0]
        for text in stop:
            state = 0
            for character in text:
                if character not in self._next[state]:
                    self._next[state][character] = len(self._next)
                    self._next.append({})
                    self._complete.append(0)
                    depth.append(depth[state] + 1)
                state = self._next[state][character]
            self._complete[state] = len(text)
        self._shorter = [0] * len(depth)  # the next shorter end that a stop string begins with
        self.begun = [n if following else 0 for n, following in zip(depth, self._next, strict=True)]
        row = deque(self._next[0].values())
        while row:  # by depth, so that what is shorter is known
            state = row.popleft()
            shorter = self._shorter[state]
            self._complete[state] = self._complete[state] or self._complete[shorter]
            self.begun[state] = self.begun[state] or self.begun[shorter]
            for character, following in self._next[state].items():
                self._shorter[following] = self._step(shorter, character)
                row.append(following)

    def _step(self, state: int, character: str) -> int:
        while character not in self._next[state] and state:
            state = self._shorter[state]
        return self._next[state].get(character, 0)

    def follow(self, state: int, text: str, may_stop: bool) -> tuple[int, tuple[int, int] | None]:
        """The state after a text; and of the stop string that is complete first, how many
        characters follow it and its length."""
        for place, character in enumerate(text):
            state = self._step(state, character)
            if may_stop and self._complete[state]:
                return state, (len(text) - place - 1, self._complete[state])
        return state, None


@lru_cache(maxsize=64)
def _stops(stop: tuple[str, ...]) -> _Stops:
    """Made once for all choices of a request."""
    return _Stops(stop)


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
