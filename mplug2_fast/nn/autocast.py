"""Residuals under autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def would_round(residual: Tensor) -> bool:
    """Whether an operator that adds this residual would round it first: under autocast operators compute in a narrow
    type, while the sum of a wide residual and a narrow update is wide, as PyTorch has it. Then the sum is the
    module's."""
    device = residual.device.type
    return torch.is_autocast_enabled(device) and residual.dtype != torch.get_autocast_dtype(device)
