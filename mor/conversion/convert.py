"""Llama models in and out, and recursive or MoR models that start from the layers of a pretrained
one.

mor rotates dimension pairs as transformers does, so weights are copied as they are.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import safe_open
from tokenizers import pre_tokenizers
from torch import Tensor, nn

from mor import checkpoint
from mor.data.tokenizer import Tokenizer
from mor.files import extra, replacing
from mor.model.config import KVStrategyName, ModelConfig, RouterConfig, Sharing, layout
from mor.model.transformer import Transformer, passes

Init = Literal["stepwise", "average", "lower", "upper", "random"]
DType = Literal["float32", "bfloat16", "float16"]

# A layer's weights here and in transformers' Llama; the rest of a name is the same.
_LAYER = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
}
_OUTER = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}

# Settings of a transformers config that mor has in one form only.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "sliding_window": (None,),
}
_SHAPE = (
    "vocab_size",
    "dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_dim",
    "rope_theta",
    "norm_eps",
    "tie_embeddings",
)


def llama_config(theirs: Any) -> ModelConfig:
    """The vanilla ModelConfig of a transformers config. Raises ValueError naming a setting that mor
    has not."""
    if theirs.model_type not in ("llama", "mistral"):
        raise ValueError(
            f"model_type={theirs.model_type!r} is no Llama; mor converts 'llama', and 'mistral' "
            "without sliding window"
        )
    for name, allowed in _REQUIRED.items():
        value = getattr(theirs, name, None)
        if value not in allowed:
            raise ValueError(
                f"the source has {name}={value!r}; mor computes with {name}={allowed[-1]!r} only"
            )
    quantized = getattr(theirs, "quantization_config", None)
    # transformers dequantizes GGUF as it reads it
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
            f"the source has rope_parameters={rope}; mor has only rope_type='default' over whole "
            "heads"
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

    A Recursive Transformer is unrolled: Llama has no shared layers, so each application gets its
    copy. Raises ValueError for a model that routes tokens or shares keys, which Llama cannot do.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    blocks = unrolled(model)
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
    """Every module that holds weights, with its name in transformers; shared layers come once per
    application."""
    for name, prefix in _OUTER.items():
        if (module := getattr(model, name)) is not None:
            yield module, prefix
    for i, block in enumerate(unrolled(model)):
        yield block, f"model.layers.{i}"


def _theirs(prefix: str, name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{prefix}.{_LAYER[first]}.{rest}" if first in _LAYER else f"{prefix}.{name}"


def _inner(state: dict[str, Tensor], prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {name: state[_theirs(prefix, name)] for name in module.state_dict()}


def unrolled(model: Transformer) -> list[nn.Module]:
    """The layers in the order in which every token passes them, shared ones as often as they are
    applied.

    Raises ValueError where tokens differ in the layers they pass, or layers in what they attend to.
    """
    config = model.config
    if config.family == "mor":
        raise ValueError(
            f"this is a MoR model (router.kind={config.router.kind!r}): its tokens skip layers and "
            "its passes are "
            "gated, which a plain stack of layers cannot do; only vanilla and recursive models "
            "convert"
        )
    if config.num_recursions > 1 and config.kv_strategy != "recursion_wise":
        raise ValueError(
            f"kv_strategy={config.kv_strategy!r} lets later recursions read the first one's keys, "
            "which a plain stack "
            "of layers cannot do; only kv_strategy='recursion_wise' converts"
        )
    shared = [
        model.recursions.shared_blocks[i] for _, layers in passes(model.config) for i in layers
    ]
    return [*model.prelude, *shared, *model.coda]


def layer_sources(config: ModelConfig, num_source_layers: int, init: Init) -> list[tuple[int, ...]]:
    """Which source layers each of the prelude, shared and coda layers starts from; () means fresh
    weights.

    The prelude takes the first source layers and the coda the last; M middle ones are left for S
    shared layers:

    stepwise: layer i takes number i (M-1) / (S-1), rounded to the nearest, halves up (S=1: the
    first).
    lower, upper: the first or last S. random: none.
    average: the mean of those it stands in for. With S R = M these are the ones at the places where
    it is applied; at another depth source layer m stands at place m (S R - 1) / (M-1), rounded
    likewise.

    Raises ValueError if the source has too few layers.
    """
    if init not in get_args(Init):
        raise ValueError(f"init={init!r} is not known; choose from {', '.join(get_args(Init))}")
    S, R, own = (
        config.shared_layers,
        config.num_recursions,
        config.prelude_layers + config.coda_layers,
    )
    first, M = config.prelude_layers, num_source_layers - own
    if S > M:
        raise ValueError(
            f"{own + S} layers of their own weights need as many in the source, which has "
            f"{num_source_layers}; "
            "lower num_layers or raise num_recursions"
        )
    chosen: dict[str, list[tuple[int, ...]]] = {
        "stepwise": [(i,) for i in _spread(S, M)],
        "lower": [(i,) for i in range(S)],
        "upper": [(i,) for i in range(M - S, M)],
        "random": [()] * S,
    }
    if init == "average":
        layer_at = (
            [i for i in range(S) for _ in range(R)]
            if config.shared_order == "sequence"
            else [*range(S)] * R
        )
        places = _spread(M, S * R)
        chosen["average"] = [
            tuple(m for m in range(M) if layer_at[places[m]] == i) for i in range(S)
        ]
        if not all(chosen["average"]):
            raise ValueError(
                f"average: with {M} source layers for {S} x {R} applications a shared layer stands "
                "in for none; "
                "lower num_layers"
            )
    own_first = [(i,) for i in range(first)]
    own_last = [(i,) for i in range(first + M, num_source_layers)]
    return [*own_first, *(tuple(first + m for m in group) for group in chosen[init]), *own_last]


def _spread(count: int, length: int) -> list[int]:
    """``count`` of 0..length-1 at regular intervals, ends included, halves rounded up; one alone is
    the first."""
    gaps = max(count - 1, 1)
    return [(2 * i * (length - 1) + gaps) // (2 * gaps) for i in range(count)]


@torch.no_grad()
def recursive_init(
    model: Transformer, config: ModelConfig, init: Init = "stepwise", *, seed: int = 0
) -> Transformer:
    """A model of ``config`` that starts from the layers of ``model`` (vanilla or recursive); see
    layer_sources.

    Embedding, final norm and head are kept; routers, and shared layers with ``random``, come from
    init_weights(seed). Raises ValueError if the configs differ in more than layers, recursions and
    routing.
    """
    for name in _SHAPE:
        ours, theirs = getattr(config, name), getattr(model.config, name)
        if ours != theirs:
            raise ValueError(
                f"{name}={ours} differs from the source's {theirs}; an initialisation keeps it"
            )
    source = unrolled(model)
    sources = layer_sources(config, len(source), init)
    made = Transformer(config).init_weights(seed).to(model.embedding.weight.dtype)
    made.embedding.load_state_dict(model.embedding.state_dict())
    made.final_norm.load_state_dict(model.final_norm.state_dict())
    if made.head is not None and model.head is not None:
        made.head.load_state_dict(model.head.state_dict())
    for block, group in zip(stored_blocks(made), sources, strict=True):
        if group:
            block.load_state_dict(_mean([source[i].state_dict() for i in group]))
    return made.eval()


def stored_blocks(model: Transformer) -> list[nn.Module]:
    """The layers with weights of their own: prelude, shared, coda."""
    return [*model.prelude, *model.recursions.shared_blocks, *model.coda]


def _mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each weight, in fp64, so that equal weights keep their value."""
    if len(states) == 1:
        return states[0]
    return {
        n: torch.stack([s[n].double() for s in states]).mean(0).to(states[0][n].dtype)
        for n in states[0]
    }


def fitting_depth(num_layers: int, num_recursions: int, sharing: Sharing) -> int:
    """The depth nearest to ``num_layers`` that the sharing scheme allows; of two, the deeper."""
    if num_recursions < 1:
        raise ValueError(f"num_recursions must be at least 1, got {num_recursions}")
    own = 2 if sharing.startswith("middle") and num_recursions > 1 else 0
    shared = (2 * (num_layers - own) + num_recursions) // (2 * num_recursions)
    return own + max(shared, 1) * num_recursions


@dataclass(frozen=True)
class Source:
    """A model read for conversion. dtype: that of the stored weights."""

    kind: str
    model: Transformer
    tokenizer: Tokenizer
    dtype: torch.dtype


def read_source(source: str) -> Source:
    """Read a Llama directory, a GGUF file, a mor checkpoint or run, or a model of the Hugging Face
    hub by name.

    Raises ValueError if it is none of these or holds a model that mor has not.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file and no .gguf; give the model's directory")
        return _read_llama(str(path.parent), gguf=path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            path = checkpoint.resolve(path)
        if json.loads((path / "config.json").read_text()).get("model_type") == "mor":
            return _read_mor(path)
        return _read_llama(str(path), gguf=None)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise ValueError(
            f"{source} does not exist; give a directory, a .gguf file or a hub name such as "
            "owner/model"
        )
    return _read_llama(source, gguf=None)


def _read_mor(path: Path) -> Source:
    _, model, tokenizer = checkpoint.load(path)
    with safe_open(path / "model.safetensors", framework="pt") as weights:
        names = weights.keys()
        stored = {
            weights.get_slice(name).get_dtype() for name in names if name.endswith("_proj.weight")
        }
    dtype = {("BF16",): torch.bfloat16, ("F16",): torch.float16}.get(tuple(stored), torch.float32)
    return Source("mor", model.to(dtype), tokenizer, dtype)


def _read_llama(name: str, *, gguf: Path | None) -> Source:
    with extra("hf", needed_for="this source"):
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    transformers.utils.logging.disable_progress_bar()
    which, said = {}, _GGUFTokenizer()
    if gguf is not None:
        which, said = {"gguf_file": gguf.name}, _check_gguf(gguf)
    try:
        # before the weights, which may be large
        llama_config(AutoConfig.from_pretrained(name, **which))
        theirs = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **which)
        their_tokenizer = AutoTokenizer.from_pretrained(name, **which)
    except (OSError, ImportError) as error:
        raise ValueError(
            f"transformers cannot read {gguf or name}: {str(error).strip().splitlines()[0]}"
        ) from error
    if said.end_of_text is not None:
        their_tokenizer.eos_token = said.end_of_text
    tokenizer = Tokenizer.from_transformers(their_tokenizer)
    _restore_pre_tokenizer(tokenizer, said.rule)
    return Source("Llama", from_llama(theirs), tokenizer, theirs.dtype)


class _GGUFTokenizer(NamedTuple):
    """rule: how to cut text before BPE."""

    rule: str = "default"
    end_of_text: str | None = None


def _check_gguf(gguf: Path) -> _GGUFTokenizer:
    """What transformers does not read from a GGUF, or not in every version (5.17 ends texts with
    the beginning's token). Raises ValueError for scaled rotary angles, without which it would
    compute something else in silence.
    """
    with extra("hf", needed_for="a GGUF file"):
        from gguf import GGUFReader, GGUFValueType
    reader = GGUFReader(gguf)
    values = {
        name.partition(".")[2]: f.contents()
        for name, f in reader.fields.items()
        if f.types[:1] == [GGUFValueType.STRING]
    }
    scaling = values.get("rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ValueError(
            f"{gguf.name} scales rotary angles (rope.scaling.type={scaling!r} or rope_freqs), "
            "which mor has not"
        )
    end = reader.fields.get("tokenizer.ggml.eos_token_id")
    end_of_text = (
        None if end is None else reader.fields["tokenizer.ggml.tokens"].contents(end.contents())
    )
    return _GGUFTokenizer(values.get("ggml.pre", "default"), end_of_text)


def _restore_pre_tokenizer(tokenizer: Tokenizer, rule: str) -> None:
    """Cut text as the GGUF says; transformers always cuts as GPT-2 does. Warns about a rule not
    known here."""
    if rule == "smollm":  # digits stand alone
        tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif rule not in ("default", "gpt-2"):
        warnings.warn(
            f"this GGUF cuts text by rule {rule!r}, which transformers does not read; some texts "
            "may get other "
            "tokens than in training. Prefer the model's original directory",
            stacklevel=2,
        )


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done. layers: for an initialisation, the source layers (unrolled) that each stored
    one starts from."""

    source: str
    out: str
    written_as: Literal["mor", "llama"]
    family: str
    layout: str
    source_layers: int
    num_layers: int
    init: Init | None
    layers: dict[str, tuple[int, ...]]
    dtype: str
    params_before: int
    params_after: int

    def lines(self) -> list[str]:
        """For people: what was written, and where every layer came from."""
        said = [
            f"{self.out}: {self.family.replace('mor', 'MoR')} model in {self.dtype}, written for "
            f"{self.written_as}",
            f"layers: {self.layout} = {self.num_layers} effective (prelude + shared x recursions + "
            "coda), "
            f"source {self.source_layers}",
        ]
        said += [f"  {name:<10} <- {_origin(group)}" for name, group in self.layers.items()]
        return [*said, f"parameters: {self.params_before:,} before, {self.params_after:,} after"]


def convert(
    source: str,
    out: Path,
    *,
    to: Literal["mor", "llama"] = "mor",
    num_recursions: int | None = None,
    sharing: Sharing = "middle_cycle",
    init: Init = "stepwise",
    num_layers: int | None = None,
    router: RouterConfig | None = None,
    kv_strategy: KVStrategyName = "recursion_wise",
    dtype: DType | None = None,
    seed: int = 0,
) -> Conversion:
    """Read ``source``, write ``out``; with ``num_recursions`` as the start of a recursive or MoR
    model.

    num_layers: effective depth; None takes the nearest to the source's that fits. router: None is
    fixed depth. Raises ValueError if ``out`` holds something, or the source or the settings do not
    fit.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists; choose another directory or delete it")
    if to == "llama" and num_recursions is not None:
        raise ValueError(
            "to='llama' writes the source as it is; leave out num_recursions, or write with "
            "to='mor'"
        )
    found = read_source(source)
    model, sources = found.model, []
    config = model.config
    if num_recursions is not None:
        depth = num_layers or fitting_depth(config.num_layers, num_recursions, sharing)
        shape = layout(depth, num_recursions, sharing)
        sources = layer_sources(
            config.replace(router=RouterConfig(), **shape), config.num_layers, init
        )
        config = config.replace(router=router or RouterConfig(), kv_strategy=kv_strategy, **shape)
        model = recursive_init(model, config, init, seed=seed)
    model = model.to(found.dtype if dtype is None else getattr(torch, dtype))
    if to == "llama":
        params = _save_llama(out, model, found.tokenizer)
    else:
        checkpoint.save(out, model, found.tokenizer)
        params = count(model)
    return Conversion(
        source=source,
        out=str(out),
        written_as=to,
        family=model.config.family,
        layout=f"{config.prelude_layers} + {config.shared_layers} x {config.num_recursions} + "
        f"{config.coda_layers}",
        source_layers=found.model.config.num_layers,
        num_layers=config.num_layers,
        init=init if sources else None,
        layers=dict(zip(_layer_names(config), sources, strict=True)) if sources else {},
        dtype=str(model.embedding.weight.dtype).removeprefix("torch."),
        params_before=count(found.model),
        params_after=params,
    )


def _save_llama(out: Path, model: Transformer, tokenizer: Tokenizer) -> int:
    """Write a transformers directory under a temporary name and rename it; returns its number of
    parameters."""
    theirs, special = to_llama(model), tokenizer.to_transformers()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(theirs.config, name, getattr(special, name))
        setattr(theirs.generation_config, name, getattr(special, name))
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as unfinished:
        theirs.save_pretrained(unfinished)
        checkpoint.open_weights(unfinished)
        tokenizer.save(unfinished)
    return count(theirs)


def count(model: nn.Module) -> int:
    """Parameters, each counted once."""
    return sum(p.numel() for p in model.parameters())


def _origin(group: tuple[int, ...]) -> str:
    if not group:
        return "fresh weights"
    return (
        f"source layer {group[0]}"
        if len(group) == 1
        else f"mean of source layers {', '.join(map(str, group))}"
    )


def _layer_names(config: ModelConfig) -> list[str]:
    parts = {
        "prelude": config.prelude_layers,
        "shared": config.shared_layers,
        "coda": config.coda_layers,
    }
    return [f"{part} {i}" for part, number in parts.items() for i in range(number)]
