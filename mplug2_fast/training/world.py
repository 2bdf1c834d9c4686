"""The ranks of a run, and how a model is spread over them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from mplug2_fast.devices import pick_device
from mplug2_fast.nn.bert_layer import BertLayer

if TYPE_CHECKING:
    from typing_extensions import Self

TIMEOUT = timedelta(hours=12)
"""Ranks wait this long for one that validates or writes. If a rank dies, the launcher ends the others."""


def backend_of(device_type: str) -> str:
    """The backend of torch.distributed for ranks on this type of device."""
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


class World:
    """The ranks that torchrun or Ray Train started, or a single one. Use it in a `with` statement.

    Attributes:
        rank, size: this rank's number, and how many there are. device: of this rank.
    """

    def __init__(self, device: str = "auto") -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if device == "auto" and self.size > 1 and torch.cuda.is_available():
            device = f"cuda:{local % torch.cuda.device_count()}"
        self.device = pick_device(device)
        self._started = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Self:
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group(backend_of(self.device.type), timeout=TIMEOUT)
            self._started = True
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            dist.destroy_process_group()

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Each number, added up over the ranks."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gathered(self, value: Any) -> list[Any]:
        """The value of every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first rank's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def spread(self, module: nn.Module, strategy: str, *, find_unused: bool) -> nn.Module:
        """The module for training on all ranks.

        Args:
            module: with its parameters on this rank's device, the same on all ranks.
            strategy: "ddp" keeps all parameters on each rank, "fsdp" a share.
            find_unused: whether some parameters have no part in some losses.
        """
        if self.size == 1:
            return module
        if strategy == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.size,))
            for layer in layers_of(module):
                fully_shard(layer, mesh=mesh)
            return fully_shard(module, mesh=mesh)
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=find_unused)


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of all stacks, the members of every `nn.ModuleList`, and BERT layers that stand alone."""
    stacked = [layer for stack in module.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    inside = {id(part) for layer in stacked for part in layer.modules()}
    alone = [part for part in module.modules() if isinstance(part, BertLayer) and id(part) not in inside]
    return stacked + alone


def checkpoint_activations(module: nn.Module) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    from torch.utils.checkpoint import checkpoint

    def recomputed(layer: nn.Module, *args: Any, **options: Any) -> Any:
        forward = partial(type(layer).forward, layer)
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        return checkpoint(forward, *args, use_reentrant=False, **options)

    for layer in layers_of(module):
        layer.forward = MethodType(recomputed, layer)  # type: ignore[method-assign]  # a copied layer gets its own
