"""The model for transformers: AutoModelForCausalLM, generate(), Trainer, PEFT, lm-eval.

``import mor.hub`` registers these classes. A directory written by ``mor.checkpoint`` and one
written by ``save_pretrained`` are the same thing, and either package loads both.

B rows · T columns, padding included · V vocabulary
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from mor.hub.configuration import MoRConfig
from mor.model.budget import Depth, DepthTable, router_for
from mor.model.checks import check_finite, check_targets, check_tensors
from mor.model.config import Selection
from mor.model.kv_cache import KVCache
from mor.model.packing import pack
from mor.model.routers import Router
from mor.model.routing import Routing
from mor.model.transformer import (
    AdaptedLinear,
    Added,
    Deepening,
    Output,
    RMSNorm,
    Transformer,
)

# generate() passes the cache as "cache" since transformers 5.24, earlier as "past_key_values".
_GENERATE_ARGUMENTS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
_CACHE = "cache" if "cache" in _GENERATE_ARGUMENTS else "past_key_values"


class MoRCache(Cache):
    """A :class:`KVCache` with the methods that ``generate`` calls. It takes no memory until the
    first tokens arrive.

    mask_BT: where in each column there is a token, and not padding. depth_BT: recursions that each
    token took; 0 at padding, too.
    """

    kv: KVCache
    mask_BT: Tensor
    depth_BT: Tensor

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.is_empty = True

    def prepare(self, model: Transformer, batch: int, num_recursions: int) -> KVCache:
        """The keys and values of ``batch`` sequences, for tokens of up to so many recursions."""
        if self.is_empty:
            weight = model.embedding.weight
            self.kv = KVCache(
                model.config,
                batch,
                num_recursions=num_recursions,
                device=weight.device,
                dtype=weight.dtype,
            )
            self.depth_BT = torch.zeros(batch, 0, dtype=torch.int64, device=weight.device)
            self.mask_BT = self.depth_BT.bool()
            self.is_empty = False
        return self.kv

    def append(self, routing: Routing) -> None:
        """Columns that a forward has read into ``kv``."""
        self.mask_BT = torch.cat([self.mask_BT, routing.mask_BT], dim=1)
        self.depth_BT = torch.cat([self.depth_BT, routing.depth_BT], dim=1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.is_empty else self.depth_BT.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return -1 if self.is_empty else self.kv.batch

    @property
    def is_initialized(self) -> bool:
        return not self.is_empty

    @property
    def is_linear(self) -> list[bool]:
        # Keys and values of earlier tokens are kept, so generate() passes new tokens alone.
        return [False]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_empty:
            return
        self.kv.select_rows(indices)
        self.mask_BT, self.depth_BT = self.mask_BT[indices], self.depth_BT[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if not self.is_empty:
            rows = torch.arange(self.kv.batch, device=self.depth_BT.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns of every row. transformers passes their number negated."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}"
            )
        kept = self.get_seq_length() + tokens_to_remove
        if kept < 0:
            raise ValueError(
                f"the cache holds {self.get_seq_length()} columns, {-tokens_to_remove} cannot be "
                "removed"
            )
        if not self.is_empty:
            self.mask_BT, self.depth_BT = self.mask_BT[:, :kept], self.depth_BT[:, :kept]
            self.kv.truncate(self.mask_BT.sum(1))

    def reset(self) -> None:
        self.is_empty = True


@dataclass
class MoROutput(ModelOutput):
    """loss: language-model loss, in training mode plus the weighted auxiliary losses. aux_loss:
    the latter alone, in either mode.
    depths: recursions that each token took, (B, T); 0 at padding, as for tokens that took none, and
    the attention mask tells them apart."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: MoRCache | None = None
    aux_loss: Tensor | None = None
    depths: Tensor | None = None

    @property
    def past_key_values(self) -> MoRCache | None:
        """The cache, by the name that transformers gave it before 5.24."""
        return self.cache


class MoRForCausalLM(PreTrainedModel, GenerationMixin):
    """:class:`Transformer` as a transformers causal language model."""

    config_class = MoRConfig
    config: MoRConfig
    model: Transformer
    _input_embed_layer = "embedding"
    _no_split_modules = ["Recursions", "Block"]  # noqa: RUF012 (a list to transformers)
    supports_gradient_checkpointing = True
    depth: Depth = None
    """Of forwards in evaluation mode that name none."""
    accepts_loss_kwargs = True

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config.to_model_config())
        if (table := getattr(config, "depth_table", None)) is not None:
            self.model.depth_table = DepthTable.from_dict(table)
        self.gradient_checkpointing = False
        self.is_balanced = False
        self.post_init()  # type: ignore[no-untyped-call]

    check_folder: ClassVar[Callable[[Path], None] | None] = None
    """Compares a folder with its checksums; set by ``mor.hub``. An export has none to compare."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, **settings: Any
    ) -> Any:
        """As transformers does it, but every tensor is accounted for.

        Raises ValueError for a local folder that differs from its checksums, and for tensors that
        are missing, left over or not finite.
        """
        folder = Path(str(pretrained_model_name_or_path), settings.get("subfolder") or "")
        if cls.check_folder is not None and folder.is_dir():
            cls.check_folder(folder)
        wanted = settings.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **settings
        )
        model, info = loaded
        _account(model, info, pretrained_model_name_or_path)
        return loaded if wanted else model

    @classmethod
    def from_transformer(cls, model: Transformer, **settings: Any) -> MoRForCausalLM:
        """Wrap a model without a copy. settings: those of transformers, such as eos_token_id."""
        if model.depth_table is not None:
            settings["depth_table"] = asdict(model.depth_table)
        with torch.device("meta"):
            made = cls(MoRConfig.from_model_config(model.config, **settings))
        made.model = model
        made.train(model.training)
        return made

    def save_pretrained(self, *args: Any, **settings: Any) -> Any:
        """As transformers does it, with the table of depths that the model has now, and with the
        depth of its GenerationConfig."""
        table = self.model.depth_table
        vars(self.config).pop("depth_table", None)
        if table is not None:
            self.config.depth_table = asdict(table)
        generation = self.generation_config
        if generation is not None and getattr(generation, "depth", None) is not None:
            # Else transformers leaves out of it, in reading, all that it has no name for.
            generation._from_model_config = False
        return super().save_pretrained(*args, **settings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: MoRCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        selection: Selection | None = None,
        max_depth: int | None = None,
        depth: Depth = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: MoRCache | None = None,
        position_ids: Tensor | None = None,
    ) -> MoROutput | tuple[Any, ...]:
        """Logits, the loss if there are labels, and the depth of every token.

        attention_mask: (B, T), or with a cache (B, columns so far + T); padding may be on either
        side.
        labels: (B, T), -100 where there is nothing to learn; shifted here. selection: by default
        ``topk`` for training steps (training mode with labels), otherwise ``threshold``, which is
        causal.
        logits_to_keep: 1 gives the last real token of each row, a larger number the last columns,
        0 all, a tensor those columns. max_depth: caps the recursions. depth: the mean depth
        (mor/model/budget.py), or "full"; ``generate`` takes it from the GenerationConfig as well.
        position_ids: (B, T) or (1, T), the tokens before each one in its sequence, which is what
        the model counts by itself; any others are refused. Where they start again at 0 in a row,
        another document begins, as packing collators mean it.
        past_key_values: the older name of cache.
        """
        self._refuse_unsupported(inputs_embeds, output_hidden_states, output_attentions)
        if input_ids is None:
            raise ValueError("input_ids are needed")
        check_tensors(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            position_ids=position_ids,
        )
        self._tell_of_adapters()
        cache = _usable(past_key_values if cache is None else cache, use_cache)
        if depth is None and not self.training and selection != "topk" and max_depth is None:
            depth = self.depth
        router = self._router(depth, selection, max_depth)
        deepest = self.model.router.num_recursions if router is None else router.num_recursions
        kv = cache.prepare(self.model, len(input_ids), deepest) if cache is not None else None
        mask_BT = _own_mask(attention_mask, input_ids, cache)
        documents_BT = None
        if position_ids is not None:
            documents_BT = _documents(position_ids, input_ids, mask_BT, kv)
        last_only = labels is None and documents_BT is None and _keeps_last(logits_to_keep, mask_BT)
        training_step = self.training and labels is not None
        if training_step and torch.is_grad_enabled():
            self.model.depth_table = None  # it was of weights that are about to change
        output = self.model(
            input_ids,
            mask_BT=mask_BT,
            documents_BT=documents_BT,
            cache=kv,
            selection=selection or ("topk" if training_step else "threshold"),
            max_depth=max_depth,
            router=router,
            logits="last" if last_only else "all",
            recompute=self.gradient_checkpointing and self.training,
        )
        if cache is not None:
            cache.append(output.routing)
        loss = aux_loss = None
        if labels is not None:
            loss, aux_loss = self._losses(output, labels, num_items_in_batch)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        made = MoROutput(loss, output.logits_BTV[:, kept], cache, aux_loss, output.routing.depth_BT)
        return made if return_dict is not False else made.to_tuple()

    def _router(
        self, depth: Depth, selection: Selection | None, max_depth: int | None
    ) -> Router | None:
        """That of a depth; None for the model's own. Raises ValueError for what goes with no
        depth."""
        if depth is None:
            return None
        if max_depth is not None or selection == "topk" or self.training:
            raise ValueError(
                "depth is a causal rule for evaluation mode; it goes with neither max_depth, "
                "selection='topk' nor training"
            )
        return router_for(self.model, depth)

    def _losses(
        self, output: Output, labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor]:
        """What training minimizes, or in evaluation the language-model loss alone; and the sum of
        the auxiliary losses."""
        batch_shape = output.routing.tokens.batch_shape
        check_targets(labels, batch_shape, self.model.config.vocab_size, name="labels")
        if self.training and self.balances_by_bias and not self.is_balanced:
            warnings.warn(
                "balancing='loss_free' needs callbacks=[mor.hub.LoadBalancing()] in "
                "Trainer: nothing balances the load",
                stacklevel=2,
            )
        if self.training and self.model.router.learns_from_exits:
            warnings.warn(
                "a router that predicts gains learns nothing here, where none are measured; train "
                "it with mor train",
                stacklevel=2,
            )
        logits, aux_loss = output.logits_BTV, output.routing.weighted_loss
        lm_loss = self.loss_function(
            logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch
        )
        # The loss is a mean over this batch, one of several in a step.
        if num_items_in_batch is not None:
            aux_loss = aux_loss * (labels[:, 1:] != -100).sum() / num_items_in_batch
        return lm_loss + aux_loss if self.training else lm_loss, aux_loss

    @property
    def balances_by_bias(self) -> bool:
        """Whether the router's load is balanced between the steps of training and not by a loss."""
        return self.model.router.balances_between_steps

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """As Transformer.init_weights does, for weights that a checkpoint does not hold."""
        if isinstance(module, Added) and not module.drawn:
            init.zeros_(module.weight)
        elif isinstance(module, Deepening):
            init.zeros_(module.gate)
        elif isinstance(module, torch.nn.Linear | torch.nn.Embedding | Added):
            init.normal_(module.weight, mean=0.0, std=self.config.init_std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    def _refuse_unsupported(
        self,
        inputs_embeds: Tensor | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
    ) -> None:
        wanted = {
            "inputs_embeds": inputs_embeds is not None,
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }
        for name, given in wanted.items():
            if given or (given is None and getattr(self.config, name, False)):
                raise ValueError(f"{name} is not supported by MoRForCausalLM")
        if hasattr(self.model.embedding, "neftune_noise_alpha"):  # Trainer's hook hangs there
            raise ValueError(
                "NEFTune is not supported by MoRForCausalLM, which embeds the tokens of all rows "
                "in one; leave out neftune_noise_alpha"
            )

    def _tell_of_adapters(self) -> None:
        """PEFT warns of a tied layer by the names that layers have in other models."""
        embedding: torch.nn.Module = self.model.embedding
        if self.config.tie_embeddings and not isinstance(embedding, torch.nn.Embedding):
            warnings.warn(
                "an adapter stands around the embedding of a model with tie_word_embeddings=True: "
                "it changes the head as well, before merging as after it. Take a checkpoint with "
                "tie_word_embeddings=False to adapt the embedding alone",
                stacklevel=3,
            )
        for layer in self.modules():
            if isinstance(getattr(layer, "base_layer", None), AdaptedLinear) and not _adds(layer):
                raise ValueError(
                    f"{type(layer).__name__} changes what a layer gives by more than a sum, and "
                    "layers of this model have adapters of their own, which weights that were "
                    "merged would not reach. Take LoRA without DoRA, or other layers as "
                    "target_modules, such as those of the prelude and the coda"
                )

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: torch.nn.Linear | None) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **settings: Any) -> torch.nn.Embedding:
        made = super().resize_token_embeddings(*args, **settings)
        self.model.config = self.model.recursions.config = self.config.to_model_config()
        self.model.router.resize_vocabulary(self.config.vocab_size)
        return made

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kwargs.pop("tokenizer", None)  # generate() passes on what stop_strings alone needs
        made: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        return made

    def _prepare_position_ids_for_generation(self, *_: Any, **__: Any) -> None:
        """The model counts by itself, and on with padding on either side."""

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        made: LogitsProcessorList = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        return LogitsProcessorList([FiniteLogits(), *made])

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # keys and values are kept by recursion

    def _prepare_cache_for_generation(  # type: ignore[override]  # its other arguments differ between versions
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if (depth := getattr(generation_config, "depth", None)) is not None:
            model_kwargs.setdefault("depth", depth)
        if generation_config.use_cache and model_kwargs.get(_CACHE) is None:
            model_kwargs[_CACHE] = MoRCache()


class FiniteLogits(LogitsProcessor):
    """Ends ``generate`` with a ValueError when the model's logits are NaN or infinite: no token
    follows from them."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_finite(scores)
        return scores


def _account(model: MoRForCausalLM, info: Mapping[str, Any], place: Any) -> None:
    """Raise ValueError if a model is not what its files hold. info: transformers' record of
    loading."""
    broken = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
        and tensor.device.type != "meta"
        and not tensor.isfinite().all()
    ]
    # Those of another shape: transformers refuses them, or was told to ignore them.
    kinds: dict[str, Collection[str]] = {
        "missing": info["missing_keys"],
        "left over": info["unexpected_keys"],
        "not finite (nan or infinity)": broken,
    }
    if problems := [
        f"{kind}: {', '.join(sorted(each)[:6])}{' ..' if len(each) > 6 else ''}"
        for kind, each in kinds.items()
        if each
    ]:
        raise ValueError(
            f"the tensors of {place} are not those of the model that its settings describe; "
            f"{'; '.join(problems)}"
        )


def _adds(layer: torch.nn.Module) -> bool:
    """Whether a layer of PEFT adds something to what its base layer gives, and that is all."""
    variants = getattr(layer, "use_dora", {})
    return type(layer).__module__.startswith("peft.tuners.lora") and not any(variants.values())


def _usable(cache: Any, use_cache: bool | None) -> MoRCache | None:
    """The cache given, or a new one where one is wanted."""
    if cache is None:
        return MoRCache() if use_cache else None
    if not isinstance(cache, MoRCache):
        raise ValueError(
            f"the cache must be a MoRCache, as forward returns it, not a {type(cache).__name__}"
        )
    return cache


def _keeps_last(logits_to_keep: int | Tensor, mask_BT: Tensor | None) -> bool:
    """Whether the last token of each row is all that is asked for. Raises ValueError if a row has
    none."""
    if isinstance(logits_to_keep, Tensor) or logits_to_keep != 1:
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep counts columns, 0 for all, got {logits_to_keep}")
        return False
    if mask_BT is not None and not mask_BT.any(1).all():
        row = int(mask_BT.any(1).logical_not().nonzero()[0])
        raise ValueError(f"row {row} of the batch has no token: its attention_mask is all 0")
    return True


def _own_mask(
    attention_mask: Tensor | None, input_ids: Tensor, cache: MoRCache | None
) -> Tensor | None:
    """The part of a mask that belongs to the new tokens. Raises ValueError if it does not fit them,
    or denies what the cache holds."""
    if attention_mask is None:
        return None
    (rows, new), past = input_ids.shape, cache.get_seq_length() if cache is not None else 0
    if attention_mask.shape not in ((rows, new), (rows, past + new)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; input_ids of shape "
            f"{(rows, new)} after {past} columns in the cache need {(rows, past + new)}"
        )
    if (
        cache is not None
        and past
        and attention_mask.shape[1] > new
        and not torch.equal(attention_mask[:, :past].bool(), cache.mask_BT)
    ):
        raise ValueError(
            "attention_mask hides other tokens than it did when the cache read them; what a cache "
            "holds is seen by all later tokens"
        )
    return attention_mask[:, -new:]


def _documents(
    position_ids: Tensor, input_ids: Tensor, mask_BT: Tensor | None, kv: KVCache | None
) -> Tensor | None:
    """Numbers of documents where positions start again, None where they do not.

    Raises ValueError for positions other than the model's: 0, 1, 2 .. in each document.
    """
    if position_ids.ndim != 2 or position_ids.shape not in (
        input_ids.shape,
        (1, input_ids.shape[1]),
    ):
        raise ValueError(
            f"position_ids have shape {tuple(position_ids.shape)}, input_ids "
            f"{tuple(input_ids.shape)}; they must be equal"
        )
    real_BT = torch.ones_like(input_ids).bool() if mask_BT is None else mask_BT.bool()
    position_BT = position_ids.expand_as(input_ids)
    documents_BT = None
    begins_BT = (position_BT == 0) & real_BT
    if kv is None and (begins_BT.sum(1) > 1).any():
        documents_BT = begins_BT.cumsum(1)
    tokens = pack(
        input_ids,
        real_BT,
        start=None if kv is None else kv.length,
        documents_BT=documents_BT,
    )
    if not torch.equal(position_BT.flatten()[tokens.place], tokens.position):
        raise ValueError(
            "position_ids differ from the positions of the tokens, which the model counts by "
            "itself: 0, 1, 2 .. over the real tokens of each row, and on from what the cache "
            f"holds. Expected {tokens.unpack(tokens.position).tolist()[0][:8]} .. in the first "
            "row; leave position_ids out"
        )
    return documents_BT
