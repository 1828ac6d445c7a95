"""What transformers' Trainer needs in addition to the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from mor.hub.modeling import MoRForCausalLM, MoROutput
from mor.model.routers import TokenChoiceRouter


class LoadBalancing(TrainerCallback):
    """Loss-free balancing in Trainer: every optimizer step moves the router's bias against the load
    of that step.

    With several processes, each balances by its own load. Raises ValueError at the start of
    training if the model's router does not balance this way.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        (self.model,) = (module for module in model.modules() if isinstance(module, MoRForCausalLM))
        if not self.model.balances_by_bias:
            raise ValueError(
                "LoadBalancing needs a router of kind='token_choice' with balancing='loss_free'"
            )
        self.loads: list[Tensor] = []
        self.model.is_balanced = True
        self.hook = self.model.register_forward_hook(self._count)

    def _count(self, model: MoRForCausalLM, _: Any, output: MoROutput) -> None:
        if model.training and output.depths is not None:
            depths = output.depths.flatten()
            self.loads.append(torch.bincount(depths, minlength=model.config.num_recursions + 1)[1:])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        router = self.model.model.router
        assert isinstance(router, TokenChoiceRouter)
        router.update_bias(torch.stack(self.loads).sum(0))
        self.loads.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.hook.remove()
        self.model.is_balanced = False
