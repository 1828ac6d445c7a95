"""GGUF files of Llama models: what transformers overlooks in them is read or refused here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from tokenizers import pre_tokenizers

from mor.checkpoint import Checkpoint
from mor.conversion.llama import read_llama
from mor.data.tokenizer import Tokenizer
from mor.files import extra


class _Notes(NamedTuple):
    """cut_rule: how to cut text before BPE."""

    cut_rule: str
    end_of_text: str | None


def read_gguf(path: Path) -> Checkpoint:
    """The model and tokenizer of a GGUF file; transformers undoes its quantization, to float32.

    Raises ValueError for a file that cannot be read or holds what mor cannot compute. Warns if text
    may be cut into other tokens than in training.
    """
    notes = _notes(path)
    found = read_llama(str(path.parent), gguf_file=path.name, end_of_text=notes.end_of_text)
    _restore_pre_tokenizer(found.tokenizer, notes.cut_rule)
    return found


def _notes(path: Path) -> _Notes:
    """What transformers does not read, or not in every version (5.17 ends texts with the token
    that begins them).

    Raises ValueError for scaled rotary angles: transformers would compute something else in
    silence.
    """
    with extra("hf", needed_for="a GGUF file"):
        from gguf import GGUFReader, GGUFValueType
    reader = GGUFReader(path)
    values = {
        name.partition(".")[2]: field.contents()
        for name, field in reader.fields.items()
        if field.types[:1] == [GGUFValueType.STRING]
    }
    scaling = values.get("rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ValueError(
            f"{path.name} scales rotary angles (rope.scaling.type={scaling!r} or rope_freqs), "
            "which mor does not do"
        )
    end = reader.fields.get("tokenizer.ggml.eos_token_id")
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    return _Notes(
        cut_rule=values.get("ggml.pre", "default"),
        end_of_text=None if end is None or tokens is None else tokens.contents(end.contents()),
    )


def _restore_pre_tokenizer(tokenizer: Tokenizer, rule: str) -> None:
    """Cut text by the GGUF's rule (transformers always cuts like GPT-2); warn of an unknown one."""
    if rule == "smollm":  # every digit is a token
        tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif rule not in ("default", "gpt-2"):
        warnings.warn(
            f"this GGUF cuts text by rule {rule!r}, which transformers does not read; some texts "
            "may get other tokens than in training. Prefer the model's original directory",
            stacklevel=2,
        )
