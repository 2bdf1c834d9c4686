"""What autocast does to an operator's arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mplug2_fast.ops.runtime.choice import device_type

_HAVE_AUTOCAST = frozenset(("cpu", "cuda"))


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the tensor's device; None if autocast is off, or the device has none."""
    device = "cpu" if tensor.is_cpu else device_type(tensor)  # the first form saves a call
    if device not in _HAVE_AUTOCAST and not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast(values: Any, dtype: torch.dtype) -> list[Any]:
    """The values, floating-point tensors in dtype."""
    return [v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]
