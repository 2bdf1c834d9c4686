"""What bounds an operator: something measured beside it that does less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops.runtime import onednn

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """A computation that an operator is compared with.

    Attributes:
        name: as the table shows it.
        prepare: from the operator's arguments to a callable that runs the baseline once.
        devices: kinds of devices that it is for.
    """

    name: str
    prepare: Callable[[Arguments], Callable[[], Any]]
    devices: tuple[str, ...] = ("cpu", "cuda")


def copy_of(*names: str) -> Callable[[Arguments], Callable[[], Any]]:
    """Copies of as many bytes as the named arguments have: the same traffic without arithmetic."""

    def prepare(arguments: Arguments) -> Callable[[], Any]:
        sources = [arguments[name].contiguous() for name in names]
        targets = [torch.empty_like(source) for source in sources]

        def run() -> None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)

        return run

    return prepare


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product alone, by the best that PyTorch has for the device."""
    fast = x.is_cpu and onednn.multiplies(x.dtype)  # elsewhere oneDNN refuses the type, or PyTorch takes it anyway
    return onednn.linear(x, weight, bias) if fast else F.linear(x, weight, bias)
