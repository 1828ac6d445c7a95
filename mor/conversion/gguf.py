"""GGUF files of Llama models. Every tensor and every setting of the model is read or refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from mor import checkpoint
from mor.checkpoint import Checkpoint
from mor.conversion.llama import read_tokenizer
from mor.data.tokenizer import Tokenizer, special_ids
from mor.files import extra, naming
from mor.model.config import ModelConfig
from mor.weights import Weights

# What GGUF calls the parts of a vanilla model.
_OUTER = {"embedding": "token_embd", "final_norm": "output_norm", "head": "output"}
_LAYER = {
    "attention_norm": "attn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_output",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}
# Settings that mor has no other value for.
_FIXED: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "attention.causal": (True,),
}
# Tokens that end a text: of text, of a turn, of a message.
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_gguf(path: Path) -> Checkpoint:
    """The model and tokenizer of a GGUF file; its quantization is undone, to float32.

    Raises ValueError for a file that cannot be read, for tensors that are missing or left over, and
    for settings that mor cannot compute. Warns if text may be cut into other tokens than in
    training.
    """
    with extra("hf", needed_for="a GGUF file"):
        from gguf import GGUFReader
    try:
        reader = GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.") or name.endswith(("_id", ".pre"))
        }
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a GGUF file: {error}") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with naming(path):
        config = _config(fields, tensors)
    model = checkpoint.build(config, _weights(path, config, tensors), names=_gguf_name)
    ids = {
        name: value
        for name in (*_ENDS, "bos_token_id", "padding_token_id")
        if (value := fields.get(f"tokenizer.ggml.{name}")) is not None
    }
    with naming(path):
        generation = special_ids(_generation(ids), config.vocab_size)
    found = read_tokenizer(
        config,
        generation,
        path.parent,
        end_of_text=ids.get("eos_token_id"),  # some versions of transformers take the beginning
        gguf_file=path.name,
    )
    _restore_pre_tokenizer(found, str(fields.get("tokenizer.ggml.pre", "default")))
    return Checkpoint(config, model, found)


def _config(fields: dict[str, Any], tensors: dict[str, Any]) -> ModelConfig:
    """Raises ValueError for another architecture, and for any setting of it that is not read."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture={architecture!r}; mor converts 'llama' only")
    given = {
        name.removeprefix("llama."): value
        for name, value in fields.items()
        if name.startswith("llama.")
    }
    read: set[str] = set()

    def take(name: str, default: Any = None) -> Any:
        read.add(name)
        value = given.get(name, default)
        if value is None:
            raise ValueError(f"llama.{name} is missing")
        each = set(value) if isinstance(value, list) else {value}
        if len(each) != 1:
            raise ValueError(f"llama.{name}={value} differs between layers; mor's layers are equal")
        return each.pop()

    if "token_embd.weight" not in tensors:
        raise ValueError("there is no token_embd.weight, the embedding")
    rows = int(tensors["token_embd.weight"].shape[1])
    dim, heads = take("embedding_length"), take("attention.head_count")
    head_dim = take("attention.key_length", take("rope.dimension_count", dim // heads))
    for name in ("rope.dimension_count", "attention.value_length"):
        if take(name, head_dim) != head_dim:
            raise ValueError(f"llama.{name}={given[name]} is not the size of a head, {head_dim}")
    if take("vocab_size", rows) != rows:
        raise ValueError(f"llama.vocab_size={given['vocab_size']}, but the embedding has {rows}")
    config = ModelConfig(
        vocab_size=rows,
        dim=dim,
        num_heads=heads,
        num_kv_heads=take("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_dim=take("feed_forward_length"),
        shared_layers=take("block_count"),
        max_seq_len=take("context_length"),
        rope_theta=take("rope.freq_base", 10_000.0),
        norm_eps=take("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in tensors,
    )
    for name in given.keys() - read:
        if given[name] not in _FIXED.get(name, (0, False)):
            raise ValueError(f"llama.{name}={given[name]!r} is a setting that mor does not have")
    return config


def _gguf_name(ours: str) -> str:
    stem, _, kind = ours.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    layer, _, part = stem.removeprefix("recursions.shared_blocks.").partition(".")
    return f"blk.{layer}.{_LAYER[part]}.{kind}"


def _weights(path: Path, config: ModelConfig, tensors: dict[str, Any]) -> Weights:
    from gguf import dequantize

    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}

    def read(name: str) -> Tensor:
        stored = tensors[name]
        try:
            weight = torch.tensor(dequantize(stored.data, stored.tensor_type))
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"{name} in {path} cannot be read: {error}") from error
        part = name.split(".")[-2]
        if part in heads:  # llama.cpp rotates neighbouring dimensions
            weight = weight.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
        return weight.float()

    # GGUF counts dimensions from the innermost.
    shapes = {name: tuple(map(int, reversed(t.shape))) for name, t in tensors.items()}
    return Weights(str(path), shapes, read)


def _generation(ids: dict[str, int]) -> dict[str, Any]:
    """The special tokens as generation_config.json has them."""
    ends: list[Any] = []
    for name in _ENDS:
        if name in ids and ids[name] not in ends:
            ends.append(ids[name])
    found = {"bos_token_id": ids.get("bos_token_id"), "pad_token_id": ids.get("padding_token_id")}
    if ends:
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]  # type: ignore[assignment]
    return {name: value for name, value in found.items() if value is not None}


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
