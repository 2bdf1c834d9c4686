"""From which size on fast modules are faster than the original ones.

Smaller calls go to the original's code: there the overhead of a call weighs more than what a faster kernel saves. The
sizes for CPUs were measured on a Zen 3, which has no instructions for products in half precision.
"""

from __future__ import annotations

from torch import Tensor

from mplug2_fast.ops import onednn
from mplug2_fast.ops.linear_act import CUDA_PLAIN_ROWS, CUDA_ROWS

NO_GAIN = "no gain"

_FLOAT32_BLOCK = 1 << 28
"""Multiplications of its first linear layer from which a vision block with local temporal modules gains."""

_LARGE_WEIGHT = 1 << 21
_FLOAT32_PRODUCT, _WIDENED_PRODUCT = 1 << 30, 1 << 17
"""Multiplications from which a product gains, in float32 and in a type that the processor has to widen."""

_FLOAT32_NORM, _HALF_NORM, _CUDA_NORM = 1 << 20, 3 << 16, 1 << 22
"""Elements from which a layer norm gains."""


def of_norm(x: Tensor) -> bool:
    if x.is_cpu:
        return x.numel() >= (_FLOAT32_NORM if x.element_size() >= 4 else _HALF_NORM)
    return x.numel() >= _CUDA_NORM


def of_product(x: Tensor, weight: Tensor, *, fused: bool = False) -> bool:
    """Of a linear layer. `fused`: with an activation or a residual."""
    if x.is_cuda:
        return x.numel() >= (CUDA_ROWS if fused else CUDA_PLAIN_ROWS) * x.shape[-1]
    size = weight.numel()
    work = x.numel() * weight.shape[0]
    if x.element_size() < 4 and not onednn.multiplies(x.dtype):
        return work >= _WIDENED_PRODUCT
    return size >= _LARGE_WEIGHT or work >= _FLOAT32_PRODUCT


def of_block(x: Tensor, weight: Tensor) -> bool:
    """Of a vision block with local temporal modules, by the weight of its first linear layer."""
    if x.is_cuda:
        return True
    return of_product(x, weight, fused=True) or x.numel() * weight.shape[0] >= _FLOAT32_BLOCK
