"""Checksums of tensors' memory. They reveal every write.

`Tensor._version` misses writes through `.data`, NumPy, DLPack and fused optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mplug2_fast.ops.runtime import cpu, formula, memory


def is_readable(tensor: Tensor) -> bool:
    """Whether `checksum` supports a tensor: plain CPU memory without gaps."""
    if formula.is_watched((tensor,)) or formula.is_needed((tensor,)) or not cpu.available():
        return False
    if not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_conj():
        return False
    return _has_no_gaps(tensor) and memory.facts((tensor,)) != 0


def _has_no_gaps(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 2 and tensor.t().is_contiguous())


def checksum(tensors: Sequence[Tensor]) -> int:
    """A 64-bit hash of the bytes of readable tensors, in memory order.

    It always detects a change of a single 32-bit word, and misses other changes with a probability of about 2^-32.
    dtypes, shapes and strides do not matter. It runs at memory speed: 18 GB/s on two cores of a Zen 3.
    """
    pieces = [(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in tensors]
    threads = cpu.threads(sum(size for _, size in pieces) // 4)
    return cpu.module().checksum(cpu.isa(), threads, pieces)


def matrix_checksum(matrix: Tensor) -> int:
    """Another such hash, of a readable matrix. Products with few rows can compute it too."""
    if not matrix.is_contiguous() or matrix.numel() == 0:
        return checksum((matrix,))
    size, row = (part.numel() * part.element_size() for part in (matrix, matrix[0]))
    return cpu.module().matrix_checksum(cpu.isa(), cpu.threads(size // 4), matrix.data_ptr(), size, row)


class ReadWeights:
    """Checksums of weights that products computed while they read them."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], int] = {}

    def add(self, weight: Tensor, value: int) -> None:
        self._found[_place(weight)] = value

    def checksum(self, weight: Tensor) -> int:
        """`matrix_checksum(weight)`, computed here if no product has read this matrix."""
        found = self._found.get(_place(weight))
        return matrix_checksum(weight) if found is None else found


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


_reading: ContextVar[ReadWeights | None] = ContextVar("mplug2_fast_read_weights", default=None)


@contextmanager
def reading_weights() -> Iterator[ReadWeights]:
    """Inside, products with few rows compute the checksums of their weights, which must not be freed meanwhile."""
    read = ReadWeights()
    token = _reading.set(read)
    try:
        yield read
    finally:
        _reading.reset(token)


def weights_to_read() -> ReadWeights | None:
    """Where a product adds its weight's checksum; None if nobody needs it."""
    return _reading.get()
