"""Matrix products of swapped modules. Weights of large products are kept packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2_fast.ops import linear_act, pack_weight
from mplug2_fast.ops.linear_act import Activation
from mplug2_fast.ops.runtime.onednn import is_packed, pays


def keep_packed(weight: Tensor, rows: int) -> None:
    """Packs the weight of a linear layer or a 1×1×1 convolution for inference on a CPU, if that pays."""
    if not pays(weight, rows) or torch.compiler.is_compiling() or torch.is_grad_enabled() or not weight.is_cpu:
        return
    holder = weight if weight._base is None else weight._base
    # Other tensors are temporary: a copy kept with them would never be found again.
    if isinstance(holder, nn.Parameter) and not torch.is_autocast_enabled("cpu") and not is_packed(weight):
        pack_weight(weight, rows)


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none", residual: Tensor | None = None
) -> Tensor:
    """`ops.linear_act` with a packed weight."""
    keep_packed(weight, x.numel() // max(1, x.shape[-1]))
    return linear_act(x, weight, bias, activation, residual=residual)
