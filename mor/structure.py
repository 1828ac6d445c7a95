"""What an answer must look like: JSON, a JSON schema, a regular expression or a grammar.

llguidance (extra ``serve``) says at each place which tokens may come next. A grammar is compiled
once for each tokenizer, and each answer follows its own copy of it.

M answers · V vocab · W words of 32 bits
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from mor.data.tokenizer import Tokenizer
from mor.files import extra
from mor.settings import Settings

Kind = Literal["json_object", "json_schema", "regex", "lark"]
# White space between the parts of JSON, where a weak model could go on with it for ever.
_SPACE = r"[ \t\n]{0,16}"


class Structure(Settings):
    """What an answer must look like.

    kind: json_object is any JSON object, and needs no text. For json_schema the text is a schema,
    for regex a regular expression, for lark a grammar in llguidance's variant of Lark. Between the
    parts of JSON there may be up to 16 spaces, tabs and new lines, unless the schema says
    otherwise ("x-guidance").
    """

    kind: Kind
    text: str = ""

    def __post_init__(self) -> None:
        if (self.kind == "json_object") == bool(self.text):
            needs = "takes no text" if self.text else "needs a text"
            raise ValueError(f"a structure of kind {self.kind!r} {needs}")
        if self.kind == "json_schema":
            try:
                schema = json.loads(self.text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"the JSON schema is not JSON: {error}") from None
            if not isinstance(schema, dict):
                raise ValueError(f"a JSON schema must be a JSON object, got {self.text[:60]}")


class Grammars:
    """Structures compiled for a tokenizer. Raises ImportError without llguidance, and ValueError
    for a tokenizer that it cannot work with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        with extra("serve", needed_for="structured output"):
            import llguidance
            import llguidance.numpy
        self._library = llguidance
        self.end_ids = tokenizer.end_ids
        try:
            self._tokens = llguidance.LLTokenizer(
                tokenizer.backend.to_str(), eos_token=list(tokenizer.end_ids)
            )
        except Exception as error:  # the library has no narrower one
            raise ValueError(
                f"structured output does not work with this tokenizer: {error}"
            ) from error
        self._compiled = lru_cache(maxsize=256)(self._compile)

    @cached_property
    def _executor(self) -> Any:
        return self._library.LLExecutor()

    def matcher(self, structure: Structure) -> Any:
        """At the beginning of an answer. Raises ValueError, with llguidance's reason, for a
        structure that it does not take."""
        return self._compiled(structure).deep_copy()

    def _compile(self, structure: Structure) -> Any:
        matcher = self._library.LLMatcher
        try:
            grammar = {
                "json_object": lambda _: _of_schema(matcher, '{"type": "object"}'),
                "json_schema": lambda text: _of_schema(matcher, text),
                "regex": matcher.grammar_from_regex,
                "lark": matcher.grammar_from_lark,
            }[structure.kind](structure.text)
            made = matcher(self._tokens, grammar, log_level=0)
            reason = made.get_error()
        except Exception as error:
            reason = str(error)
        if reason:
            raise ValueError(
                f"the structure ({structure.kind}) cannot be followed: {' '.join(reason.split())}"
            )
        return made

    def allowed(self, matchers: Sequence[Any], vocab_size: int) -> np.ndarray:
        """Which tokens may come next in each answer, (M, V) of bool."""
        bits_MW = np.zeros((len(matchers), -(-self._tokens.vocab_size // 32)), dtype=np.int32)
        if len(matchers) == 1:
            self._library.numpy.fill_next_token_bitmask(matchers[0], bits_MW, 0)
        else:
            numbered = [(matcher, i) for i, matcher in enumerate(matchers)]
            self._library.numpy.fill_next_token_bitmask_par(self._executor, numbered, bits_MW)
        for i, matcher in enumerate(matchers):
            if matcher.is_error():  # then it would allow the end
                bits_MW[i] = 0
        known = np.unpackbits(bits_MW.view(np.uint8), axis=1, bitorder="little")
        allowed_MV = np.zeros((len(matchers), vocab_size), dtype=bool)
        width = min(vocab_size, self._tokens.vocab_size)
        allowed_MV[:, :width] = known[:, :width]
        return allowed_MV


def _of_schema(matcher: Any, schema: str) -> str:
    grammar: str = matcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _SPACE})
    return grammar


@lru_cache(maxsize=4)
def grammars(tokenizer: Tokenizer) -> Grammars:
    """Made once for a tokenizer: a large one takes half a second."""
    return Grammars(tokenizer)
