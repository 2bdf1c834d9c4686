"""The feed-forward network of a transformer block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mplug2_fast.nn.fp8 import is_fp8
from mplug2_fast.nn.int8 import is_int8
from mplug2_fast.nn.layer_norm import NORMS
from mplug2_fast.nn.parts import linear, plain
from mplug2_fast.nn.unchanged import unchanged
from mplug2_fast.ops.linear_act import Activation
from mplug2_fast.ops.mlp import mlp
from mplug2_fast.ops.residual import would_round

_BLOCK_BYTES = 24 << 20
"""Most bytes between the layers. From 32 MiB on, glibc maps fresh pages for each tensor."""


Product = Callable[..., Tensor]
Norm = Callable[[Tensor], Tensor]


class MLP(nn.Module):
    """Two linear layers with an activation between them. The state dict is that of CLIP's `mlp`.

    Args:
        dim: input and output channels.
        hidden: channels between the layers.
        activation: `"quick_gelu"`, `"gelu"` (erf) or `"none"`.
        bias: whether the layers have one.
    """

    def __init__(self, dim: int, hidden: int, activation: Activation = "quick_gelu", bias: bool = True) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.c_fc = nn.Linear(dim, hidden, bias=bias)
        self.c_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor, *, norm: nn.Module | None = None, residual: bool = False) -> Tensor:
        """x and result `(..., dim)`. `norm` is applied to x first, if given; `residual` adds x to the result."""
        if isinstance(norm, nn.LayerNorm) and (norm.weight is None or norm.bias is None):
            raise ValueError("norm must have a weight and a bias; apply any other norm before the call")
        return feed_forward(x, self.c_fc, self.c_proj, self.activation, norm=norm, residual=residual)


def feed_forward(
    x: Tensor,
    fc: nn.Module,
    proj: nn.Module,
    activation: Activation,
    *,
    norm: nn.Module | None = None,
    residual: bool = False,
) -> Tensor:
    """proj(activation(fc(norm(x)))) of x `(..., dim)`, plus x if `residual`. Calls modules that are not plain."""
    if is_int8(fc, proj) and not would_round(x):
        return in_int8(x, fc.weight.shape[0], fc, proj, activation, norm, residual)
    if is_fp8(fc, proj) and not would_round(x):
        return proj(fc(x, activation, norm=norm), residual=x if residual else None)
    if not plain(fc, proj) or not (norm is None or unchanged(NORMS, norm)):
        out = linear(proj, linear(fc, x if norm is None else norm(x), activation))
        return x + out if residual else out
    return compute(x, fc, proj, activation, norm=norm, residual=residual)


def in_int8(
    x: Tensor, hidden: int, fc: Product, proj: Product, activation: Activation, norm: Norm | None, residual: bool
) -> Tensor:
    """`feed_forward` with 8-bit weights, in blocks of rows.

    Args:
        hidden: outputs of fc. fc, proj: called with x and an activation or a residual, such as `Int8Linear`.
    """
    rows = x.reshape(-1, x.shape[-1])
    blocks = -(-len(rows) * hidden * x.element_size() // _BLOCK_BYTES)
    if len(rows) == 0 or blocks == 1:
        return proj(fc(x if norm is None else norm(x), activation), residual=x if residual else None)
    out = [
        proj(fc(block if norm is None else norm(block), activation), residual=block if residual else None)
        for block in rows.tensor_split(blocks)
    ]
    return torch.cat(out).view(x.shape)


def compute(
    x: Tensor,
    fc: nn.Module,
    proj: nn.Module,
    activation: Activation,
    *,
    norm: nn.Module | None = None,
    residual: bool = False,
) -> Tensor:
    """`feed_forward` with the parameters of modules, which are not called."""
    adds_outside = residual and would_round(x)
    out = mlp(
        x,
        fc.weight,
        fc.bias,
        proj.weight,
        proj.bias,
        activation=activation,
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else norm.bias,
        eps=1e-5 if norm is None else norm.eps,
        residual=residual and not adds_outside,
    )
    return x + out if adds_outside else out
