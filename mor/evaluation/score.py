"""What tokens cost a model, as sums: the one definition of NLL, perplexity and bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Score:
    """Sums over the tokens that were predicted, and no others.

    nats: their negative log-likelihood. tokens: how many. bytes: UTF-8 bytes of the text that they
    spell, special tokens none; 0 for the answers of a task, which are no text, and for text that
    the tokenizer loses some of.
    """

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            nats=self.nats + other.nats,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
        )

    @property
    def nll(self) -> float:
        """Nats per token. Raises ValueError if no token was predicted."""
        if not self.tokens:
            raise ValueError("no token was predicted, so there is no loss")
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Infinite beyond the largest number."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """None where there is no text, or not all of it."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    @property
    def in_words(self) -> str:
        if self.bits_per_byte is None:
            return f"{self.nll:.3f} nats per token"
        return f"{self.bits_per_byte:.3f} bits/byte"
