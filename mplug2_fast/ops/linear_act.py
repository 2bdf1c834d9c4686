"""Linear layer with its activation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.ops import onednn

Activation = Literal["none", "gelu", "quick_gelu"]

QUICK_GELU_SCALE = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702·x), of any shape (CLIP's activation)."""
    return x * torch.sigmoid(QUICK_GELU_SCALE * x)


_EAGER = {"none": lambda x: x, "gelu": F.gelu, "quick_gelu": quick_gelu}


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    """`activation(x @ weight.T + bias)`.

    Args:
        x: `(..., in_features)`. weight: `(out_features, in_features)`. bias: `(out_features,)`.
        activation: `"gelu"` is the erf form.

    Returns `(..., out_features)` in x's dtype.
    """
    if activation != "quick_gelu" and onednn.serves(x, weight, bias):
        return onednn.linear(x, weight, bias, activation)
    return _EAGER[activation](F.linear(x, weight, bias))
