"""Minimum sizes for fast modules to win.

Smaller calls run the original code, because the overhead of a call exceeds what a faster kernel saves. The sizes for
CPUs were measured on a Zen 3, which has no instructions for products in half precision, unless another one is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mplug2_fast.ops.linear_act import CUDA_PLAIN_ROWS, CUDA_ROWS
from mplug2_fast.ops.runtime import cpu, onednn

_FLOAT32_BLOCK = 1 << 28
"""Minimum multiplications of the first linear layer, for a vision block with local temporal modules, and for a local
temporal module outside a block."""

_WIDENED_TEMPORAL = 1 << 21
"""The same for a local temporal module in a type that the processor must widen."""

_LARGE_WEIGHT = 1 << 21
_FLOAT32_PRODUCT, _WIDENED_PRODUCT = 1 << 30, 1 << 17
"""Minimum multiplications of a product, in float32 and in a type that the processor must widen."""

_HALF_PRODUCT, _FEW_ROWS_OF_LARGE = 1 << 29, 64
"""Minimum multiplications, and maximum rows, with a large weight in bfloat16 that the processor multiplies. With up to
64 rows the native kernel takes 12 to 33% less than PyTorch. In between, the checksum of the weight costs 2 to 7% more
than its packing gains, which is 4 to 7% from 256 rows on (3072 times 768, Zen 4)."""

_FEW_ROWS, _FEW_ROWS_WEIGHT, _COLD_WEIGHT = 16, 1 << 15, 1 << 19
"""Maximum rows and minimum elements of the weight for the native kernel to win in bfloat16. It takes half as long as
PyTorch, which needs at least 25 µs. A single call after products with many rows, such as that of a pooler, takes 100 µs
more, and wins with a weight of the last size (Zen 4)."""

_INT8_ROWS, _INT8_WORK = 64, 1 << 23
"""Minimum rows, and minimum multiplications, for an 8-bit weight to win. It then takes a quarter of the time in float32
and half of it in bfloat16, its checksum included (Zen 4)."""

_FLOAT32_NORM, _HALF_NORM, _CUDA_NORM = 1 << 20, 3 << 16, 1 << 22
"""Minimum elements of a layer norm."""


def of_norm(x: Tensor) -> bool:
    if x.is_cpu:
        return x.numel() >= (_FLOAT32_NORM if x.element_size() >= 4 else _HALF_NORM)
    return x.numel() >= _CUDA_NORM


class TooSmall(NamedTuple):
    """Inputs that are too small.

    Attributes:
        anywhere: minimum number of elements on any device.
        on_cpu: type -> numbers of elements that are too small on a CPU. Fewer elements may gain.
        few_in_loops_only: whether those gain only in a loop, such as generation, where no product has many rows.
    """

    anywhere: int = 0
    on_cpu: Mapping[torch.dtype, range] = {}
    few_in_loops_only: bool = False

    def has(self, x: Tensor) -> bool:
        elements = x.numel()
        return elements < self[0] or (x.is_cpu and elements in self[1].get(x.dtype, _NONE))


_NONE = range(0)


def small_for_norm() -> TooSmall:
    """For `of_norm`."""
    return TooSmall(_HALF_NORM, {torch.float32: range(_FLOAT32_NORM)})


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
    few = x.dtype is torch.bfloat16 and x.numel() <= _few_elements(size)
    return few or work >= _least_work(x.dtype, size)


def small_for_product(size: Size) -> TooSmall:
    """For `of_product`."""
    small = {t: range(-(-_least_work(t, size) // size.outputs)) for t in onednn.DTYPES if onednn.multiplies(t)}
    if torch.bfloat16 in small:
        small[torch.bfloat16] = range(_few_elements(size) + 1, small[torch.bfloat16].stop)
    return TooSmall(0, small, size.elements < _COLD_WEIGHT)


def _least_work(dtype: torch.dtype, size: Size) -> int:
    """Minimum multiplications of a product with more than a few rows, in a type that the processor multiplies."""
    if size.elements < _LARGE_WEIGHT:
        return _FLOAT32_PRODUCT
    return 0 if dtype.itemsize >= 4 else _HALF_PRODUCT


def of_int8(x: Tensor, size: Size) -> bool:
    """Linear layers whose weights are 8-bit in large products."""
    return x.is_cpu and x.dtype in cpu.DTYPES and x.numel() >= _fewest_int8(size)


def rows_for_int8(size: Size) -> int:
    """Minimum rows for `of_int8`."""
    return -(-_fewest_int8(size) // max(1, size.elements // max(1, size.outputs)))


def small_for_int8(small: TooSmall, size: Size) -> TooSmall:
    """What is too small for `of_int8` and for another way to compute."""
    fewest = _fewest_int8(size)
    ranges = {t: range(r.start, min(r.stop, fewest)) if t in cpu.DTYPES else r for t, r in small.on_cpu.items()}
    return small._replace(on_cpu=ranges)


def _fewest_int8(size: Size) -> int:
    """Minimum elements of an input."""
    inputs = size.elements // max(1, size.outputs)
    return max(_INT8_ROWS * inputs, -(-_INT8_WORK // max(1, size.outputs)))


def _few_elements(size: Size) -> int:
    """Maximum elements of an input with few rows, for which the native kernel wins in bfloat16."""
    wins = size.elements >= _FEW_ROWS_WEIGHT and cpu.available()
    rows = _FEW_ROWS if size.elements < _LARGE_WEIGHT else _FEW_ROWS_OF_LARGE
    return rows * (size.elements // size.outputs) if wins else -1


def of_block(x: Tensor, size: Size) -> bool:
    """A vision block with local temporal modules, by the size of its first linear layer."""
    return x.is_cuda or x.numel() * size.outputs >= _FLOAT32_BLOCK or of_product(x, size, fused=True)


def of_local_temporal(x: Tensor, size: Size) -> bool:
    """A local temporal module outside a known block, by the size of its first product."""
    narrow = x.element_size() < 4 and not onednn.multiplies(x.dtype)
    return x.is_cuda or x.numel() * size.outputs >= (_WIDENED_TEMPORAL if narrow else _FLOAT32_BLOCK)
