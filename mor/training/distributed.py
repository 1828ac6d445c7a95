"""Ranks: how a training run spreads over processes. Nothing else knows about ranks.

Started by ``torchrun``, or alone. Two ways to hold the model:

ddp   every rank holds everything; gradients are averaged once per step.
fsdp  every rank holds a share of weights, gradients and optimizer state (FSDP2). The container of
      the recursions is one unit, gathered once however often its layers are applied; a router that
      learns is another, always in float32; the rest of the model is the third.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mor.device import Precision, is_low, moved, pick_device
from mor.model.transformer import Transformer
from mor.training.config import Parallel

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among ``size`` ones."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """Mean over ranks; each gives a tensor of the same shape."""
        return self._reduce(x, dist.ReduceOp.SUM) / self.size

    def sum(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.MAX)

    def any(self, *asked: bool) -> list[bool]:
        """Of each question, whether a rank says yes. One process alone asks no device."""
        if self.size == 1:
            return list(asked)
        numbers = moved(torch.tensor(asked, dtype=torch.float32), self.device)
        return [bool(x) for x in self.max(numbers).tolist()]

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return x
        x = x.detach().clone()
        dist.all_reduce(x, operation)
        return x

    def from_first(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def first_does(self, act: Callable[[], T]) -> T:
        """What a call gives that the first rank alone makes. Where it fails, all ranks raise its
        error, so that none waits for the others."""
        try:
            answer: Any = act() if self.is_first else None
        except Exception as error:
            self.from_first((None, error))
            raise
        answer, failure = self.from_first((answer, None))
        if failure is not None:
            raise failure
        return answer  # type: ignore[no-any-return]

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


ALONE = Ranks(0, 1, torch.device("cpu"))


@contextmanager
def ranks(device: str = "auto", precision: Precision = "auto") -> Iterator[Ranks]:
    """The ranks that torchrun's environment describes, each on the GPU of its ``LOCAL_RANK``;
    without it this process alone. device: ``auto``, or a torch device. precision: see
    :func:`mor.device.pick_device`."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(0, 1, pick_device(device, precision))
        return
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        # Named before anything is put on a GPU: else every rank would keep memory on the first.
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    place = pick_device(device, precision)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), size, place)
    finally:
        dist.destroy_process_group()


def spread(
    model: Transformer, ranks: Ranks, how: Parallel, precision: Precision = "auto"
) -> nn.Module:
    """What to call for a training forward; ``model`` stays the module that holds the weights."""
    model.router.processes = ranks
    if ranks.size == 1:
        return model
    if how == "ddp":
        devices = [ranks.device.index] if ranks.device.type == "cuda" else None
        # Newer versions rename broadcast_buffers; older ones have no other name.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
    shard(model, ranks, low=is_low(ranks.device, precision))
    return model


def shard(model: Transformer, ranks: Ranks, *, low: bool) -> None:
    """low: gather weights in bfloat16, which halves what is sent and held; gradients are averaged
    in float32 all the same."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    # Nothing is changed in place of what these modules return.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None,
        reduce_dtype=torch.float32 if low else None,
        cast_forward_inputs=False,  # states between layers stay in float32, as under autocast
    )
    router = model.router
    if any(True for _ in router.parameters()):
        fully_shard(router, mesh=mesh, reshard_after_forward=False)
        assert isinstance(router, FSDPModule)
        # Its methods are called many times in a forward, itself never: so it is gathered here, and
        # its gradients are averaged at the end of the backward pass.
        model.recursions.register_forward_pre_hook(lambda *_: router.unshard())
    if low:
        model.embedding.register_forward_hook(lambda _module, _ids, states: states.float())
    for unit in (model.recursions, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


@contextmanager
def reducing(forward: nn.Module, last: bool) -> Iterator[None]:
    """Around a forward and backward: gradients are averaged over ranks only in the ``last`` one of
    a step, however many batches it accumulates."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(last)
        # The weights stay the same, so one gathering serves the step.
        forward.set_reshard_after_backward(last)
        yield
    elif isinstance(forward, nn.parallel.DistributedDataParallel) and not last:
        with forward.no_sync():
            yield
    else:
        yield


def backward(forward: nn.Module, loss: Tensor) -> None:
    """Gradients of the loss; parameters that it does not depend on get none.

    DDP waits for a gradient of each, and takes the model's outputs for what the loss depends on.
    So those that the loss does not reach are given zeros, which are taken away again. On all ranks
    they are the same: what a step leaves out depends on its number alone.
    """
    if not isinstance(forward, nn.parallel.DistributedDataParallel):
        loss.backward()
        return
    reached = _reached(loss)
    idle = [
        p for p in forward.parameters() if p.requires_grad and p not in reached and p.grad is None
    ]
    sum(((p * 0).sum() for p in idle), loss).backward()
    for p in idle:
        p.grad = None


def _reached(loss: Tensor) -> set[Tensor]:
    """The leaves that a backward pass comes to. (Tensors are told apart by identity.)"""
    nodes, seen, found = [loss.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(leaf)
        nodes += [before for before, _ in node.next_functions]
    return found


def reshard(model: nn.Module) -> None:
    """Give back the gathered weights, after forwards that no backward followed."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_share(x: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    from torch.distributed.tensor import DTensor

    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """A tensor without its sharding."""
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x
