"""The local temporal module: the only part of the vision encoder that sees the order of frames."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops import onednn
from mplug2_fast.ops.linear_act import QUICK_GELU_SCALE, linear_act, quick_gelu


def temporal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution over frames with zero padding, as shifted multiply-adds.

    Args:
        x: `(batch, frames, tokens, channels)`. weight: `(channels, kernel)`, kernel odd. bias: `(channels,)`.

    Returns a new tensor of x's shape, accumulated in float32 and left so: the activation comes before rounding.
    """
    kernel, frames = weight.shape[1], x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, bias, taps = x.to(dtype), bias.to(dtype), weight.to(dtype).t().contiguous()
    out = torch.addcmul(bias, x, taps[kernel // 2])
    for tap in range(kernel):
        shift = tap - kernel // 2  # out[t] takes x[t + shift]
        if shift == 0 or abs(shift) >= frames:
            continue
        low, high = max(0, -shift), frames - max(0, shift)
        out[:, low:high].addcmul_(x[:, low + shift : high + shift], taps[tap])
    return out


def local_temporal(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Patches plus up(QuickGELU(conv over time(down(layer_norm(patches))))); the class token passes by.

    Args:
        x: `(batch, frames, 1 + patches, channels)`.
        down_weight: `(inner, channels)`. conv_weight: `(inner, kernel)`. up_weight: `(channels, inner)`.

    Returns a new tensor of x's shape and dtype. Source: mPLUG-2 (arXiv 2302.00402), section 3.2; released name `lmhra`.
    """
    # The class tokens go through the products as well (1 row in 257) so that no strided copy of the patches is made.
    fused = onednn.serves(x, norm_weight, norm_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias)
    scale = QUICK_GELU_SCALE if fused else 1.0
    h = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    h = linear_act(h, down_weight, down_bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    h = temporal_conv(h, conv_weight.to(wide) * scale, conv_bias.to(wide) * scale)
    if fused:  # QuickGELU(z) = SiLU(1.702·z) / 1.702
        h = onednn.linear(F.silu(h, inplace=True).to(x.dtype), up_weight, up_bias * scale)
        out = torch.add(x, h, alpha=1 / scale, out=h)
    else:
        out = x + F.linear(quick_gelu(h).to(x.dtype), up_weight, up_bias)
    out[:, :, 0] = x[:, :, 0]
    return out
