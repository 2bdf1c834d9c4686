"""Matrix products of swapped modules: weights that many rows go through are kept packed."""

from __future__ import annotations

import torch
from torch import Tensor

from mplug2_fast.ops import linear_act, pack_weight
from mplug2_fast.ops.linear_act import Activation
from mplug2_fast.ops.onednn import packed

MANY_ROWS = 512
"""From so many rows on a packed weight pays for its memory."""


def keep_packed(weight: Tensor, rows: int) -> None:
    """Packs a weight, a linear layer's or a 1×1×1 convolution's, for inference on a CPU, where that pays and is not yet
    done."""
    if rows < MANY_ROWS or torch.compiler.is_compiling() or torch.is_grad_enabled() or weight.device.type != "cpu":
        return
    if not torch.is_autocast_enabled("cpu") and packed(weight) is None:
        pack_weight(weight, rows)


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none", residual: Tensor | None = None
) -> Tensor:
    """`ops.linear_act`."""
    keep_packed(weight, x.numel() // max(1, x.shape[-1]))
    return linear_act(x, weight, bias, activation, residual=residual)
