"""Residuals of linear layers: fused into the operator, unless that would round them."""

from __future__ import annotations

from torch import Tensor

from mplug2_fast.ops.layer_norm import layer_norm
from mplug2_fast.ops.linear_act import Activation, linear_act
from mplug2_fast.ops.norm_linear_act import norm_linear_act
from mplug2_fast.ops.runtime.autocast import autocast_dtype


def would_round(residual: Tensor) -> bool:
    """Whether an operator that adds this residual would round it first. Autocast makes operators compute in a narrow
    dtype, but in PyTorch the sum of a wide residual and a narrow update is wide. Then add outside of the operator."""
    dtype = autocast_dtype(residual)
    return dtype is not None and residual.dtype != dtype


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The linear layer of x `(..., in_features)`, plus the residual `(..., out_features)` unless it is None."""
    if residual is not None and would_round(residual):
        return residual + linear_act(x, weight, bias)
    return linear_act(x, weight, bias, residual=residual)


def norm_linear_residual(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Layer norm of x `(..., in_features)`, then the linear layer and its activation. Also returns the norm, which is
    the next residual."""
    if norm_weight is None or norm_bias is None or would_round(x):
        normed = layer_norm(x, norm_weight, norm_bias, eps=eps)
        return linear_act(normed, weight, bias, activation), normed
    return norm_linear_act(x, norm_weight, norm_bias, weight, bias, activation, eps=eps)
