"""Llama models in and out, through transformers.

mor rotates pairs of dimensions as transformers does, so weights are copied as they are.
transformers is imported where it is needed: initialising from a mor checkpoint does not need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mor import checkpoint
from mor.checkpoint import Checkpoint
from mor.conversion.layers import count_parameters, unrolled_layers
from mor.data.tokenizer import Tokenizer
from mor.files import extra, replacing
from mor.model.config import ModelConfig
from mor.model.transformer import Transformer

# A layer's weights here and in transformers' Llama; the rest of a name is the same.
_LAYER = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
}
_OUTER = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}

# Settings of a transformers config of which mor computes one form only.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "sliding_window": (None,),
}


def llama_config(theirs: Any) -> ModelConfig:
    """The vanilla ModelConfig of a transformers config. Raises ValueError naming the setting that
    mor does not have."""
    if theirs.model_type not in ("llama", "mistral"):
        raise ValueError(
            f"model_type={theirs.model_type!r} is not a Llama model; mor converts 'llama', and "
            "'mistral' without a sliding window"
        )
    for name, allowed in _REQUIRED.items():
        value = getattr(theirs, name, None)
        if value not in allowed:
            raise ValueError(
                f"the source has {name}={value!r}; mor computes with {name}={allowed[-1]!r} only"
            )
    quantized = getattr(theirs, "quantization_config", None)
    # transformers dequantizes GGUF files by itself.
    if quantized is not None and "gguf" not in str(quantized):
        raise ValueError(
            "the source's weights are quantized; convert the original model, or a GGUF file of it"
        )
    rope = theirs.rope_parameters
    if (
        rope.get("rope_type", "default") != "default"
        or rope.get("partial_rotary_factor", 1.0) != 1.0
    ):
        raise ValueError(
            f"the source has rope_parameters={rope}; mor rotates whole heads with "
            "rope_type='default' only"
        )
    return ModelConfig(
        vocab_size=theirs.vocab_size,
        dim=theirs.hidden_size,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads,
        ffn_dim=theirs.intermediate_size,
        shared_layers=theirs.num_hidden_layers,
        max_seq_len=theirs.max_position_embeddings,
        rope_theta=rope["rope_theta"],
        norm_eps=theirs.rms_norm_eps,
        tie_embeddings=theirs.tie_word_embeddings,
        init_std=theirs.initializer_range,
    )


def from_llama(theirs: Any) -> Transformer:
    """A vanilla model with the weights and the dtype of a ``LlamaForCausalLM``."""
    config = llama_config(theirs.config)
    model = Transformer(config).to(theirs.dtype)
    state = theirs.state_dict()
    for module, prefix in _pairs(model):
        module.load_state_dict(_inner(state, prefix, module))
    return model.eval()


def to_llama(model: Transformer) -> Any:
    """A ``LlamaForCausalLM`` that computes what ``model`` does, in its dtype.

    A Recursive Transformer is unrolled: Llama has no shared layers, so every application gets a
    copy. Raises ValueError for a model that routes tokens or shares keys, which Llama cannot do.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    blocks = unrolled_layers(model)
    made: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=len(blocks),
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            initializer_range=config.init_std,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    made.to(model.embedding.weight.dtype)
    state: dict[str, Tensor] = {}
    for module, prefix in _pairs(model):
        state |= {_theirs(prefix, name): tensor for name, tensor in module.state_dict().items()}
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    made.load_state_dict(state)
    return made.eval()


def _pairs(model: Transformer) -> Iterator[tuple[nn.Module, str]]:
    """Every module with weights, by its name in transformers; shared layers once per use."""
    for name, prefix in _OUTER.items():
        if (module := getattr(model, name)) is not None:
            yield module, prefix
    for i, block in enumerate(unrolled_layers(model)):
        yield block, f"model.layers.{i}"


def _theirs(prefix: str, name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{prefix}.{_LAYER[first]}.{rest}" if first in _LAYER else f"{prefix}.{name}"


def _inner(state: dict[str, Tensor], prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {name: state[_theirs(prefix, name)] for name in module.state_dict()}


def read_llama(
    name: str, *, gguf_file: str | None = None, end_of_text: str | None = None
) -> Checkpoint:
    """A Llama directory, a GGUF file in a directory, or a model of the Hugging Face hub, in its
    dtype. end_of_text: the token that ends texts, where the tokenizer does not know it.

    Raises ImportError if transformers is missing, ValueError if it cannot read the source or mor
    cannot compute the model.
    """
    with extra("hf", needed_for="this source"):
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    transformers.utils.logging.disable_progress_bar()
    # Never code from the source, and no question whether to run it.
    settings: dict[str, Any] = {"trust_remote_code": False}
    settings |= {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        # The config first: weights may be large.
        llama_config(AutoConfig.from_pretrained(name, **settings))
        theirs = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **settings)
        tokenizer = AutoTokenizer.from_pretrained(name, **settings)
    except (OSError, ImportError) as error:
        source = name if gguf_file is None else Path(name, gguf_file)
        raise ValueError(
            f"transformers cannot read {source}: {str(error).strip().splitlines()[0]}"
        ) from error
    if end_of_text is not None:
        tokenizer.eos_token = end_of_text
    model = from_llama(theirs)
    return Checkpoint(model.config, model, Tokenizer.from_transformers(tokenizer))


def save_llama(out: Path, model: Transformer, tokenizer: Tokenizer) -> int:
    """Write a transformers directory under a temporary name and rename it; returns the number of
    parameters it holds."""
    theirs, special = to_llama(model), tokenizer.to_transformers()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(theirs.config, name, getattr(special, name))
        setattr(theirs.generation_config, name, getattr(special, name))
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as unfinished:
        theirs.save_pretrained(unfinished)
        checkpoint.open_weights(unfinished)
        tokenizer.save(unfinished)
    return count_parameters(theirs)
