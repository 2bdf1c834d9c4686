"""Two linear layers with an activation between them, a layer norm before and the residual after where asked for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops import onednn
from mplug2_fast.ops.linear_act import QUICK_GELU_SCALE, Activation, linear_act

# Rows are taken in blocks whose hidden activations fit in the last-level cache and stay under the allocator's
# threshold for fresh pages (32 MiB in glibc), which would be faulted in again at every call.
_BLOCK_BYTES = 16 << 20


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    *,
    activation: Activation,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: bool = True,
) -> Tensor:
    """`x + proj(activation(fc(layer_norm(x))))`.

    Args:
        x: `(..., channels)`. fc_weight: `(hidden, channels)`. proj_weight: `(channels, hidden)`.
        norm_weight, norm_bias: `(channels,)`; None leaves the layer norm out.
        residual: False leaves the addition of x out.

    Returns a new tensor of x's shape and dtype.
    """
    parameters = (fc_weight, fc_bias, proj_weight, proj_bias, norm_weight, norm_bias)
    if onednn.serves(x, *parameters):
        return _blocked(x, *parameters, activation=activation, eps=eps, residual=residual)
    h = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    out = F.linear(linear_act(h, fc_weight, fc_bias, activation), proj_weight, proj_bias)
    return x + out if residual else out


def _blocked(x, fc_weight, fc_bias, proj_weight, proj_bias, norm_weight, norm_bias, *, activation, eps, residual):
    """QuickGELU(z) = SiLU(1.702·z) / 1.702: the factor goes into the norm's affine part and the vectors around it."""
    rows = x.reshape(-1, x.shape[-1])
    scale, fused = (QUICK_GELU_SCALE, "swish") if activation == "quick_gelu" else (1.0, activation)
    if scale != 1.0:
        fc_bias, proj_bias = fc_bias * scale, proj_bias * scale
        if norm_weight is not None:
            norm_weight, norm_bias = norm_weight * scale, norm_bias * scale
    out = torch.empty_like(rows)
    step = max(1, _BLOCK_BYTES // (fc_weight.shape[0] * x.element_size()))
    for source, target in zip(rows.split(step), out.split(step), strict=True):
        if norm_weight is not None:
            h = F.layer_norm(source, source.shape[-1:], norm_weight, norm_bias, eps)
        else:
            h = source if scale == 1.0 else source * scale
        h = onednn.linear(onednn.linear(h, fc_weight, fc_bias, fused), proj_weight, proj_bias)
        if residual:
            torch.add(source, h, alpha=1 / scale, out=target)
        else:
            torch.mul(h, 1 / scale, out=target)
    return out.view(x.shape)
