"""Layers inside our modules. Operators compute plain layers; other layers are called."""

from __future__ import annotations

import functools

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mplug2_fast.nn.fp8 import Fp8Linear
from mplug2_fast.nn.int8 import Int8Linear
from mplug2_fast.nn.layer_norm import NORMS
from mplug2_fast.nn.unchanged import Kinds, unchanged
from mplug2_fast.ops.linear_act import EAGER, Activation, linear_act
from mplug2_fast.ops.residual import linear_residual

PLAIN: Kinds = NORMS | {
    nn.Linear,
    NonDynamicallyQuantizableLinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.Dropout,
    nn.Embedding,
}
_IDENTITY: Kinds = frozenset((nn.Identity,))
_EIGHT_BIT: Kinds = frozenset((Int8Linear, Fp8Linear))

plain = functools.partial(unchanged, PLAIN)
"""Whether all of these layers are unchanged layers of PyTorch or this package."""
is_eight_bit = functools.partial(unchanged, _EIGHT_BIT)
"""Whether all of these layers are unchanged linear layers with 8-bit weights, which fuse activations and residuals."""


def linear(layer: nn.Module, x: Tensor, activation: Activation = "none") -> Tensor:
    """activation(layer(x)) for x `(..., in_features)`."""
    if not plain(layer):
        return layer(x, activation) if is_eight_bit(layer) else EAGER[activation](layer(x))
    return linear_act(x, layer.weight, layer.bias, activation)


def add_linear(layer: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """layer(x) for x `(..., in_features)`, plus the residual `(..., out_features)` if there is one."""
    if not plain(layer):
        if is_eight_bit(layer):
            return layer(x, residual=residual)
        return layer(x) if residual is None else residual + layer(x)
    return linear_residual(x, layer.weight, layer.bias, residual)


def dropout_rate(dropout: nn.Module) -> float | None:
    """The current dropout probability, 0 in evaluation mode. None if the module must be called."""
    if plain(dropout):
        return dropout.p if dropout.training else 0.0
    return 0.0 if unchanged(_IDENTITY, dropout) else None
