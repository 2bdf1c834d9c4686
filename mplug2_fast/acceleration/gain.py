"""Minimum sizes for fast modules to win.

Smaller calls run the original code, because the overhead of a call exceeds what a faster kernel saves. The sizes for
CPUs were measured on a Zen 3, which has no instructions for products in half precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mplug2_fast.ops.linear_act import CUDA_PLAIN_ROWS, CUDA_ROWS
from mplug2_fast.ops.runtime import onednn

_FLOAT32_BLOCK = 1 << 28
"""Minimum multiplications of the first linear layer, for a vision block with local temporal modules, and for a local
temporal module outside a block."""

_WIDENED_TEMPORAL = 1 << 21
"""The same for a local temporal module in a type that the processor must widen."""

_LARGE_WEIGHT = 1 << 21
_FLOAT32_PRODUCT, _WIDENED_PRODUCT = 1 << 30, 1 << 17
"""Minimum multiplications of a product, in float32 and in a type that the processor must widen."""

_FLOAT32_NORM, _HALF_NORM, _CUDA_NORM = 1 << 20, 3 << 16, 1 << 22
"""Minimum elements of a layer norm."""


def of_norm(x: Tensor) -> bool:
    if x.is_cpu:
        return x.numel() >= (_FLOAT32_NORM if x.element_size() >= 4 else _HALF_NORM)
    return x.numel() >= _CUDA_NORM


class Minimum(NamedTuple):
    """Inputs with fewer elements are too small: in any type on any device, and by type on a CPU."""

    anywhere: int = 0
    on_cpu: Mapping[torch.dtype, int] = {}


def min_elements_of_norm() -> Minimum:
    """For `of_norm`."""
    return Minimum(_HALF_NORM, {torch.float32: _FLOAT32_NORM})


class Size(NamedTuple):
    """Outputs and elements of a module's largest weight."""

    outputs: int
    elements: int

    @classmethod
    def of(cls, weight: Tensor) -> Size:
        return cls(weight.shape[0], weight.numel())


def of_product(x: Tensor, size: Size, *, fused: bool = False) -> bool:
    """Linear layers; `fused` with an activation or a residual."""
    if x.is_cuda:
        return x.numel() >= (CUDA_ROWS if fused else CUDA_PLAIN_ROWS) * x.shape[-1]
    work = x.numel() * size.outputs
    if x.element_size() < 4 and not onednn.multiplies(x.dtype):
        return work >= _WIDENED_PRODUCT
    return size.elements >= _LARGE_WEIGHT or work >= _FLOAT32_PRODUCT


def min_elements_of_product(size: Size) -> Minimum:
    """For `of_product`."""
    if size.elements >= _LARGE_WEIGHT:
        return Minimum()
    fewest = -(-_FLOAT32_PRODUCT // size.outputs)
    return Minimum(_WIDENED_PRODUCT // size.outputs, {t: fewest for t in onednn.DTYPES if onednn.multiplies(t)})


def of_block(x: Tensor, size: Size) -> bool:
    """A vision block with local temporal modules, by the size of its first linear layer."""
    return x.is_cuda or x.numel() * size.outputs >= _FLOAT32_BLOCK or of_product(x, size, fused=True)


def of_local_temporal(x: Tensor, size: Size) -> bool:
    """A local temporal module outside a known block, by the size of its first product."""
    narrow = x.element_size() < 4 and not onednn.multiplies(x.dtype)
    return x.is_cuda or x.numel() * size.outputs >= (_WIDENED_TEMPORAL if narrow else _FLOAT32_BLOCK)
