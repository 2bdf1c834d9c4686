"""From which size on fast modules are faster than the original ones.

Smaller calls go to the original's code: there the overhead of a call weighs more than what a faster kernel saves. The
sizes for CPUs were measured on a Zen 3, which has no instructions for products in half precision.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mplug2_fast.ops.linear_act import CUDA_PLAIN_ROWS, CUDA_ROWS
from mplug2_fast.ops.runtime import onednn

_FLOAT32_BLOCK = 1 << 28
"""Multiplications of its first linear layer from which a vision block with local temporal modules gains, and from
which a local temporal module does so outside of one."""

_WIDENED_TEMPORAL = 1 << 21
"""The latter in a type that the processor has to widen."""

_LARGE_WEIGHT = 1 << 21
_FLOAT32_PRODUCT, _WIDENED_PRODUCT = 1 << 30, 1 << 17
"""Multiplications from which a product gains, in float32 and in a type that the processor has to widen."""

_FLOAT32_NORM, _HALF_NORM, _CUDA_NORM = 1 << 20, 3 << 16, 1 << 22
"""Elements from which a layer norm gains."""


def of_norm(x: Tensor) -> bool:
    if x.is_cpu:
        return x.numel() >= (_FLOAT32_NORM if x.element_size() >= 4 else _HALF_NORM)
    return x.numel() >= _CUDA_NORM


def least_of_norm() -> int:
    """Elements that are too few for `of_norm`, whatever their type."""
    return _HALF_NORM


class Size(NamedTuple):
    """Of the largest weight of a module: its outputs, and its elements."""

    outputs: int
    elements: int

    @classmethod
    def of(cls, weight: Tensor) -> Size:
        return cls(weight.shape[0], weight.numel())


def of_product(x: Tensor, size: Size, *, fused: bool = False) -> bool:
    """Of linear layers. `fused`: with an activation or a residual."""
    if x.is_cuda:
        return x.numel() >= (CUDA_ROWS if fused else CUDA_PLAIN_ROWS) * x.shape[-1]
    work = x.numel() * size.outputs
    if x.element_size() < 4 and not onednn.multiplies(x.dtype):
        return work >= _WIDENED_PRODUCT
    return size.elements >= _LARGE_WEIGHT or work >= _FLOAT32_PRODUCT


def least_of_product(size: Size) -> int:
    """Elements that are too few for `of_product`, whatever their type."""
    return 0 if size.elements >= _LARGE_WEIGHT else _WIDENED_PRODUCT // size.outputs


def of_block(x: Tensor, size: Size) -> bool:
    """Of a vision block with local temporal modules, by the size of its first linear layer."""
    return x.is_cuda or x.numel() * size.outputs >= _FLOAT32_BLOCK or of_product(x, size, fused=True)


def of_local_temporal(x: Tensor, size: Size) -> bool:
    """Of a local temporal module outside a known block, by the size of its first product."""
    narrow = x.element_size() < 4 and not onednn.multiplies(x.dtype)
    return x.is_cuda or x.numel() * size.outputs >= (_WIDENED_TEMPORAL if narrow else _FLOAT32_BLOCK)
