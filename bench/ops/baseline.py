"""What an operator is held against: something measured beside it, and how many times faster it is meant to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops import onednn

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """A computation that an operator is compared with.

    Attributes:
        name: as the table shows it.
        prepare: from the operator's arguments to a callable that runs the baseline once.
        target: dtype -> how many times as fast as the baseline the operator is meant to be on a CPU.
    """

    name: str
    prepare: Callable[[Arguments], Callable[[], Any]]
    target: dict[torch.dtype, float]


BOTH = (torch.float32, torch.bfloat16)


def at_least(float32: float, bfloat16: float | None = None) -> dict[torch.dtype, float]:
    return {torch.float32: float32, torch.bfloat16: float32 if bfloat16 is None else bfloat16}


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
    return onednn.linear(x, weight, bias) if x.device.type == "cpu" else F.linear(x, weight, bias)


def torch_backend(operator: Callable[..., Any]) -> Callable[[Arguments], Callable[[], Any]]:
    """PyTorch's own operators, eager."""

    def prepare(arguments: Arguments) -> Callable[[], Any]:
        run, values = operator.op.backends["torch"].run, tuple(arguments.values())
        return lambda: run(*values)

    return prepare
