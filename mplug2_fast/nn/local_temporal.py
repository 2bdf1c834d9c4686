"""The local temporal module of mPLUG-2, usable in any video transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2_fast.nn.layer_norm import LayerNorm
from mplug2_fast.ops.local_temporal import local_temporal


class LocalTemporal(nn.Module):
    """x + up(QuickGELU(depthwise convolution over time(down(layer_norm(x))))) on patches; the class token passes by.

    Starts as the identity: the up-projection is zero.

    Args:
        dim: channels. reduction: dim // reduction channels inside. kernel_size: frames, odd. eps: of the layer norm.

    Source: mPLUG-2 (arXiv 2302.00402), section 3.2; released name `lmhra`.
    """

    def __init__(self, dim: int, reduction: int = 2, kernel_size: int = 3, eps: float = 1e-5) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        inner = dim // reduction
        self.norm = LayerNorm(dim, eps=eps)
        self.down = nn.Linear(dim, inner)
        self.conv_weight = nn.Parameter(torch.empty(inner, kernel_size))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.up = nn.Linear(inner, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        self.down.reset_parameters()
        nn.init.uniform_(self.conv_weight, -(self.conv_weight.shape[1] ** -0.5), self.conv_weight.shape[1] ** -0.5)
        nn.init.zeros_(self.conv_bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x and result: `(batch, frames, 1 + patches, dim)`."""
        return local_temporal(
            x,
            self.norm.weight,
            self.norm.bias,
            self.down.weight,
            self.down.bias,
            self.conv_weight,
            self.conv_bias,
            self.up.weight,
            self.up.bias,
            eps=self.norm.eps,
        )
