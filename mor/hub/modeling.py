"""The model for transformers: AutoModelForCausalLM, generate(), Trainer, PEFT, lm-eval.

``import mor.hub`` registers these classes. A directory written by ``mor.checkpoint`` and one
written by ``save_pretrained`` are the same thing, and either package loads both.

B rows · T columns, padding included · V vocabulary
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from mor.hub.configuration import MoRConfig
from mor.model.config import Selection
from mor.model.kv_cache import KVCache
from mor.model.transformer import Output, RMSNorm, Transformer

# generate() passes the cache as "cache" since transformers 5.24, earlier as "past_key_values".
_GENERATE_ARGUMENTS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
_CACHE = "cache" if "cache" in _GENERATE_ARGUMENTS else "past_key_values"


class MoRCache(Cache):
    """A :class:`KVCache` with the methods that ``generate`` calls. It takes no memory until the
    first tokens arrive.

    depth_BT: recursions that each token of each column took; 0 at padding.
    """

    kv: KVCache
    depth_BT: Tensor

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.is_empty = True

    def prepare(self, model: Transformer, batch: int) -> KVCache:
        """The keys and values of ``batch`` sequences."""
        if self.is_empty:
            weight = model.embedding.weight
            self.kv = KVCache(model.config, batch, device=weight.device, dtype=weight.dtype)
            self.depth_BT = torch.zeros(batch, 0, dtype=torch.int64, device=weight.device)
            self.is_empty = False
        return self.kv

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
        self.kv.select_rows(indices)
        self.depth_BT = self.depth_BT[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.kv.batch, device=self.depth_BT.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns of every row. transformers passes their number negated."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}"
            )
        self.depth_BT = self.depth_BT[:, : self.depth_BT.shape[1] + tokens_to_remove]
        self.kv.truncate((self.depth_BT > 0).sum(1))

    def reset(self) -> None:
        self.is_empty = True


@dataclass
class MoROutput(ModelOutput):
    """loss: language-model loss plus weighted auxiliary losses. aux_loss: the latter alone.
    depths: recursions that each token took, (B, T); 0 at padding."""

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
    accepts_loss_kwargs = True

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config.to_model_config())
        self.gradient_checkpointing = False
        self.is_balanced = False
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_transformer(cls, model: Transformer, **settings: Any) -> MoRForCausalLM:
        """Wrap a model without a copy. settings: those of transformers, such as eos_token_id."""
        with torch.device("meta"):
            made = cls(MoRConfig.from_model_config(model.config, **settings))
        made.model = model
        made.train(model.training)
        return made

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: MoRCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        selection: Selection | None = None,
        max_depth: int | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: MoRCache | None = None,
    ) -> MoROutput | tuple[Any, ...]:
        """Logits, the loss if there are labels, and the depth of every token.

        attention_mask: (B, T), or with a cache (B, columns so far + T); padding may be on either
        side.
        labels: (B, T), -100 where there is nothing to learn; shifted here. selection: by default
        ``topk`` for training steps (training mode with labels), otherwise ``threshold``, which is
        causal.
        logits_to_keep: 1 gives the last real token of each row. max_depth: caps the recursions.
        past_key_values: the older name of cache.
        """
        _refuse(inputs_embeds=inputs_embeds, output_hidden_states=output_hidden_states)
        _refuse(output_attentions=output_attentions)
        if input_ids is None:
            raise ValueError("input_ids are needed")
        training_step = self.training and labels is not None
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = MoRCache()
        if cache is not None and not isinstance(cache, MoRCache):
            raise ValueError(
                f"the cache must be a MoRCache, as forward returns it, not a {type(cache).__name__}"
            )
        output = self.model(
            input_ids,
            mask_BT=None
            if attention_mask is None
            else attention_mask[:, -input_ids.shape[1] :].bool(),
            cache=cache.prepare(self.model, len(input_ids)) if cache is not None else None,
            selection=selection or ("topk" if training_step else "threshold"),
            max_depth=max_depth,
            logits="last" if logits_to_keep == 1 and labels is None else "all",
            recompute=self.gradient_checkpointing and self.training,
        )
        depths_BT = output.routing.depth_BT
        if cache is not None:
            cache.depth_BT = torch.cat([cache.depth_BT, depths_BT], dim=1)
        logits = output.logits_BTV
        loss = aux_loss = None
        if labels is not None:
            loss, aux_loss = self._losses(output, labels, num_items_in_batch)
        made = MoROutput(loss, logits[:, -logits_to_keep:], cache, aux_loss, depths_BT)
        return made if return_dict is not False else made.to_tuple()

    def _losses(
        self, output: Output, labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor]:
        """The sum of all losses, and that of the auxiliary ones."""
        if self.training and self.balances_by_bias and not self.is_balanced:
            warnings.warn(
                "balancing='loss_free' needs callbacks=[mor.hub.LoadBalancing()] in "
                "Trainer: nothing balances the load",
                stacklevel=2,
            )
        logits, aux_loss = output.logits_BTV, output.routing.weighted_loss
        lm_loss = self.loss_function(
            logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch
        )
        # The loss is a mean over this batch, one of several in a step.
        if num_items_in_batch is not None:
            aux_loss = aux_loss * (labels[:, 1:] != -100).sum() / num_items_in_batch
        return lm_loss + aux_loss, aux_loss

    @property
    def balances_by_bias(self) -> bool:
        """Whether the router's load is balanced between the steps of training and not by a loss."""
        return self.model.router.balances_between_steps

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """As Transformer.init_weights does, for weights that a checkpoint does not hold."""
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.init_std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: torch.nn.Linear | None) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **settings: Any) -> torch.nn.Embedding:
        made = super().resize_token_embeddings(*args, **settings)
        self.model.config = self.config.to_model_config()
        return made

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # keys and values are kept by recursion

    def _prepare_cache_for_generation(  # type: ignore[override]  # its other arguments differ between versions
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if generation_config.use_cache and model_kwargs.get(_CACHE) is None:
            model_kwargs[_CACHE] = MoRCache()


def _refuse(**unsupported: Any) -> None:
    for name, value in unsupported.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} is not supported by MoRForCausalLM")
