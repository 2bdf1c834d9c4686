"""x + proj(activation(fc(layer_norm(x)))) from the kernels of the layer norm and the linear layer, and its gradients.

The norm is a separate pass. In the prologue of the first product it would be repeated for every column of tiles, 16 to
32 times for 4096 hidden channels, and rows would pass through registers instead of the tensor memory accelerator. That
would save 4 bytes per row and channel, 4% of the time of both products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mplug2_fast.kernels import layer_norm, linear_act
from mplug2_fast.kernels._tuning import Race
from mplug2_fast.kernels.layer_norm import Rows

AGAINST_TORCH = Race("mlp", linear_act.linear_act_forward, layer_norm.layer_norm_forward)


def slower(dtype: torch.dtype, activation: str, residual: bool) -> str | None:
    """Why neither product gains by fusion, as in `linear_act.slower`. None if one of them does."""
    first = linear_act.slower(dtype, activation, False)
    return first and linear_act.slower(dtype, "none", residual) and first


def forward(
    x: Rows,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: bool,
    out: Tensor,
    z: Tensor | None = None,
) -> None:
    """Writes the result to `out`, and that of fc before the activation to `z`.

    Args:
        x: `(rows, channels)`. fc_weight: `(hidden, channels)`. proj_weight: `(channels, hidden)`. Both are dense along
            their last axis. The vectors are dense. out: `(rows, channels)`, z: `(rows, hidden)`, contiguous.
    """
    tensor, sizes, _ = x
    rows, (hidden, channels) = sizes[0] * sizes[1], fc_weight.shape
    h = x
    if norm_weight is not None:
        h = _dense(tensor.new_empty(rows, channels))
        layer_norm.forward(x, None, norm_weight, norm_bias, eps, h[0])
    if activation == "none" and z is not None:
        activated, z = z, None
    else:
        activated = tensor.new_empty(rows, hidden)
    linear_act.apply(h, fc_weight, fc_bias, activation, None, activated, z)
    linear_act.apply(_dense(activated), proj_weight, proj_bias, "none", x if residual else None, out)


def backward(
    grad: Tensor,
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: bool,
    z: Tensor,
    wanted: set[str],
) -> dict[str, Tensor]:
    """The gradients of the `wanted` arguments by name, those of vectors in float32.

    Args:
        grad, x: `(rows, channels)`, contiguous. z: `(rows, hidden)`, from `forward`.
    """
    made = {}
    if "proj_bias" in wanted:
        made["proj_bias"] = grad.sum(dim=0, dtype=torch.float32)
    inside = wanted - {"proj_weight", "proj_bias"}
    activated = z
    if activation == "none":
        dz = grad @ proj_weight if inside else None
        if "fc_bias" in wanted:
            made["fc_bias"] = dz.sum(dim=0, dtype=torch.float32)
    else:
        dz = grad @ proj_weight
        activated = torch.empty_like(z) if "proj_weight" in wanted else None
        dbias = linear_act.backward(dz, z, activation, dz, activated, wants_bias="fc_bias" in wanted)
        if dbias is not None:
            made["fc_bias"] = dbias
    if "proj_weight" in wanted:
        made["proj_weight"] = grad.t() @ activated
    if "fc_weight" in wanted:
        h = x
        if norm_weight is not None:
            h = torch.empty_like(x)
            layer_norm.forward(_dense(x), None, norm_weight, norm_bias, eps, h)
        made["fc_weight"] = dz.t() @ h
    if inside - {"fc_weight", "fc_bias"}:
        if norm_weight is None:
            made["x"] = torch.addmm(grad, dz, fc_weight) if residual else dz @ fc_weight
        else:
            dx = torch.empty_like(x) if "x" in wanted else None
            made["norm_weight"], made["norm_bias"] = layer_norm.backward(
                dz @ fc_weight, grad if residual else None, _dense(x), None, norm_weight, eps, dx, None
            )
            if dx is not None:
                made["x"] = dx
    return made


def _dense(matrix: Tensor) -> Rows:
    return matrix, (1, matrix.shape[0]), (0, matrix.stride(0))
