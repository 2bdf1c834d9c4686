"""Matrix products of swapped modules. Weights of large products are kept packed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.acceleration import int8
from mplug2_fast.ops import layer_norm, linear_act, pack_weight
from mplug2_fast.ops.linear_act import Activation
from mplug2_fast.ops.runtime.onednn import is_packed, pays

_Product = Callable[..., Tensor]


def keep_packed(weight: Tensor, rows: int) -> None:
    """Packs the weight of a linear layer or a 1×1×1 convolution for inference on a CPU, if that pays."""
    if not pays(weight, rows) or torch.compiler.is_compiling() or torch.is_grad_enabled() or not weight.is_cpu:
        return
    holder = weight if weight._base is None else weight._base
    # Other tensors are temporary: a copy kept with them would never be found again.
    if isinstance(holder, nn.Parameter) and not torch.is_autocast_enabled("cpu") and not is_packed(weight):
        pack_weight(weight, rows)


def product(x: Tensor, layer: Any, activation: Activation = "none", residual: Tensor | None = None) -> Tensor:
    """The linear layer or 1×1×1 convolution of x `(..., channels)`, with an 8-bit or a packed weight."""
    rounded = int8.find(layer, x, int8.norm_of(x))
    if rounded is not None:
        return rounded(x, activation, residual=residual)
    return _wide(x, activation, layer=layer, residual=residual)


def normalised(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """The result of a layer norm, without calling it."""
    return layer_norm(x, norm.weight, norm.bias, eps=norm.eps)


def two_products(x: Tensor, first: Any, second: Any, norm: nn.Module | None) -> tuple[_Product, _Product] | None:
    """Two linear layers with as many rows as x, if one of them has an 8-bit weight in this call. Both are called like
    `product`. norm: the layer norm that the first one reads, if there is one."""
    found = int8.find(first, x, norm), int8.find(second, x, None)
    if found == (None, None):
        return None
    return found[0] or functools.partial(_wide, layer=first), found[1] or functools.partial(_wide, layer=second)


def _wide(x: Tensor, activation: Activation = "none", *, layer: Any, residual: Tensor | None = None) -> Tensor:
    keep_packed(layer.weight, x.numel() // max(1, x.shape[-1]))
    return linear_act(x, layer.weight.flatten(1), layer.bias, activation, residual=residual)
