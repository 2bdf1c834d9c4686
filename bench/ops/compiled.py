"""The compiled peer of an operator: PyTorch's formula. On the CPU its weights are frozen into the graph and packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.ops.bounds import Arguments


class Peer(nn.Module):
    """Weights and biases are parameters, so that the compiler may pack them. The other tensors are inputs."""

    def __init__(self, formula: Callable[..., Any], arguments: Arguments) -> None:
        super().__init__()
        self.formula, self.names = formula, list(arguments)
        self.constants = {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and name.endswith(("weight", "bias")):
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))
            elif not isinstance(value, torch.Tensor):
                self.constants[name] = value

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        values = []
        for name in self.names:
            if name in self.constants:
                values.append(self.constants[name])
            else:
                values.append(getattr(self, name) if name in self._parameters else next(given))
        return self.formula(*values)


def prepare(formula: Callable[..., Any], arguments: Arguments) -> Callable[..., Any]:
    """A callable of the tensors that are no weights. Its first call compiles it."""
    tensors = (value for value in arguments.values() if isinstance(value, torch.Tensor))
    torch._inductor.config.freezing = next(tensors).device.type == "cpu"
    torch._dynamo.reset()
    return torch.compile(Peer(formula, arguments).eval(), dynamic=False)


def inputs(arguments: Arguments) -> tuple[torch.Tensor, ...]:
    return tuple(
        value
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and not name.endswith(("weight", "bias"))
    )
