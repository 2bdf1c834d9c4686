"""The rows of a tensor as kernels address them: two sizes and two strides."""

from __future__ import annotations

from torch import Tensor

Rows = tuple[Tensor, tuple[int, int], tuple[int, int]]
"""A tensor, its rows as (outer, inner), and their strides. The channels of a row are adjacent."""


def rows(x: Tensor) -> Rows:
    """x as `(outer, inner, channels)`. Copies x if two strides cannot address its rows. The caller keeps the returned
    tensor alive while a kernel reads it."""
    if x.is_contiguous():
        channels = x.shape[-1]
        return x, (1, x.numel() // channels), (0, channels)
    if x.dim() == 2:
        return x, (1, x.shape[0]), (0, x.stride(0))
    if x.dim() == 3:
        return x, (x.shape[0], x.shape[1]), (x.stride(0), x.stride(1))
    if x.dim() == 4 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)):
        return x, (x.shape[0] * x.shape[1], x.shape[2]), (x.stride(1), x.stride(2))
    return rows(x.contiguous())


def pair(x: Tensor, other: Tensor | None) -> tuple[Rows, Rows | None]:
    """The rows of two tensors of one shape, in the same (outer, inner)."""
    if other is None:
        return rows(x), None
    mine, others = rows(x), rows(other)
    if mine[1] != others[1]:  # one form must address the rows of both
        mine, others = rows(x.contiguous()), rows(other.contiguous())
    return mine, others
