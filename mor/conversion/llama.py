"""Llama models in and out.

mor rotates pairs of dimensions as transformers does, so weights are copied as they are.
transformers is imported where it is needed: initialising from a mor checkpoint does not need it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mor import checkpoint
from mor.checkpoint import Checkpoint
from mor.conversion.layers import count_parameters, plain_layers
from mor.data.tokenizer import GENERATION, SPECIAL, Tokenizer, special_ids
from mor.files import extra, naming, parse_json, read_json, replacing
from mor.hub_access import asking_the_hub
from mor.model.config import ModelConfig
from mor.model.transformer import Transformer
from mor.weights import Weights, check_finite, of_state, open_weights

# A layer's weights here and in transformers' Llama; the rest of a name is the same.
_LAYER = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
}
_OUTER = {"embedding": "embed_tokens", "final_norm": "norm", "head": "lm_head"}
_ANGLES = ("rotary_emb.inv_freq", "layers.*.self_attn.rotary_emb.inv_freq")
"""What old versions of transformers stored beside the weights: it follows from rope_theta."""

# Settings of a transformers config of which mor computes one form only.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "sliding_window": (None,),
    "rope_interleaved": (None, False),
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
    if getattr(theirs, "quantization_config", None) is not None:
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
    weights = of_state(type(theirs).__name__, theirs.state_dict())
    return llama_model(llama_config(theirs.config), weights)


def llama_model(config: ModelConfig, weights: Weights) -> Transformer:
    """A vanilla model with the weights of a Llama, in their dtype.

    Raises ValueError unless every tensor is used, and for rotary angles that contradict the config.
    """
    model = checkpoint.build(config, weights, names=llama_name, left_out=_ANGLES)
    _check_angles(config, weights)
    return model


def llama_name(ours: str) -> str:
    """What transformers calls a tensor of a vanilla model, without its prefix."""
    outer, _, rest = ours.partition(".")
    if outer in _OUTER:
        return f"{_OUTER[outer]}.{rest}"
    layer, part, inner = ours.removeprefix("recursions.shared_blocks.").split(".", 2)
    return f"layers.{layer}.{_LAYER[part]}.{inner}"


def _check_angles(config: ModelConfig, weights: Weights) -> None:
    """Angles that were stored must be those that mor computes."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    expected = 1.0 / config.rope_theta**exponent
    for theirs in weights.shapes:
        if theirs.endswith("rotary_emb.inv_freq"):
            found = weights.read(theirs)
            same = found.shape == expected.shape
            if not same or not torch.allclose(found.float(), expected, rtol=1e-2):
                raise ValueError(
                    f"{theirs} in {weights.place} holds other rotary angles than rope_theta="
                    f"{config.rope_theta:g} gives; mor computes no others"
                )


def to_llama(model: Transformer) -> Any:
    """A ``LlamaForCausalLM`` that computes what ``model`` does, in its dtype.

    A Recursive Transformer is unrolled: Llama has no shared layers, so every application gets a
    copy. Raises ValueError for a model that routes tokens or shares keys, which Llama cannot do.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    blocks = plain_layers(model)
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
            yield module, prefix if name == "head" else f"model.{prefix}"
    for i, block in enumerate(plain_layers(model)):
        yield block, f"model.layers.{i}"


def _theirs(prefix: str, name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{prefix}.{_LAYER[first]}.{rest}" if first in _LAYER else f"{prefix}.{name}"


def read_llama(name: str) -> Checkpoint:
    """A Llama directory or a model of the Hugging Face hub, in the dtype of its weights.

    Raises ImportError if transformers is missing, ValueError if the source cannot be read, if a
    tensor is missing or left over, or if mor cannot compute the model.
    """
    with extra("hf", needed_for="this source"):
        import transformers
    transformers.utils.logging.disable_progress_bar()
    folder = Path(name) if Path(name).is_dir() else _downloaded(name)
    settings = read_json(folder / "config.json")
    with naming(folder / "config.json"):
        config = llama_config(_their_config(folder / "config.json"))
    model = llama_model(config, open_weights(folder))
    file = folder / GENERATION
    if file.is_file():
        generation = read_json(file)
    else:
        file, generation = folder / "config.json", _of_config(settings)
    with naming(file):
        generation |= special_ids(generation, config.vocab_size)
    return Checkpoint(config, model, read_tokenizer(config, generation, folder))


def _their_config(file: Path) -> Any:
    from transformers import AutoConfig

    if "model_type" not in read_json(file):
        raise ValueError("it names no model_type, such as 'mor' or 'llama'")
    try:
        return AutoConfig.from_pretrained(str(file.parent), trust_remote_code=False)
    except Exception as error:  # of whatever type transformers' checks of single settings raise
        raise ValueError(f"transformers does not take it: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    words = " ".join((str(error) or repr(error)).split())
    return words if len(words) < 200 else f"{words[:200]}..."


def _of_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What old models say in config.json of beginning, end and padding."""
    return {name: settings[name] for name in SPECIAL if settings.get(name) is not None}


def read_tokenizer(
    config: ModelConfig,
    generation: Mapping[str, Any],
    folder: Path,
    *,
    end_of_text: int | None = None,
    **settings: Any,
) -> Tokenizer:
    """The tokenizer of a directory with the generation settings of its model, whose special ids
    are checked.

    end_of_text: the token that ends documents, where the tokenizer's own word is not to be taken.
    settings: for ``AutoTokenizer``. Raises ValueError if there is none that transformers can read,
    or if it is larger than the embedding.
    """
    from transformers import AutoTokenizer

    place = folder / settings.get("gguf_file", "")
    try:
        # Never code from the source, and no question whether to run it.
        theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **settings)
    except Exception as error:  # of whatever type: the tokenizer's own files are read by many hands
        raise ValueError(
            f"transformers cannot read the tokenizer of {place}: {_in_one_line(error)}"
        ) from error
    with naming(place):
        if theirs.eos_token is None and end_of_text is None:
            ends: Any = generation.get("eos_token_id")
            end_of_text = ends[0] if isinstance(ends, list) and ends else ends
        if end_of_text is not None:
            theirs.eos_token = theirs.convert_ids_to_tokens(end_of_text)
            if theirs.eos_token is None:
                raise ValueError(f"the tokenizer has no token {end_of_text}, the end of a text")
        found = Tokenizer.from_transformers(theirs)
        if generation:
            files = found.files | {GENERATION: json.dumps(dict(generation), indent=2)}
            found = Tokenizer(found.backend, end_of_text=found.end_of_text, files=files)
        found.check_fits(config.vocab_size)
    return found


def _downloaded(name: str) -> Path:
    """The files of a model on the hub, from the cache where they are there."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        with asking_the_hub(name):
            return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is not a directory, and the hub does not give it: {_in_one_line(error)}"
        ) from error


def save_llama(out: Path, model: Transformer, tokenizer: Tokenizer) -> int:
    """Write a transformers directory under a temporary name and rename it; returns the number of
    parameters it holds. Raises ValueError for weights that are not finite."""
    theirs, special = to_llama(model), tokenizer.to_transformers()
    for name, tensor in theirs.state_dict().items():
        check_finite(name, tensor, "the model to save")
    tokenizer.check_fits(model.config.vocab_size)
    ends = list(tokenizer.end_ids)
    ids: dict[str, Any] = {
        "bos_token_id": special.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": special.pad_token_id,
    }
    if GENERATION in tokenizer.files:
        ids |= special_ids(parse_json(tokenizer.files[GENERATION], GENERATION))
    for name, value in ids.items():
        setattr(theirs.config, name, value)
        setattr(theirs.generation_config, name, value)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as unfinished:
        theirs.save_pretrained(unfinished)
        checkpoint.share_weights(unfinished)
        tokenizer.save(unfinished)
    return count_parameters(theirs)
