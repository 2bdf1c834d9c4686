"""Whether a tensor's memory holds what its shape and strides claim."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_is_neg = Tensor.is_neg


def is_sound(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels may read all of them as they are. Cheap: every call asks."""
    try:
        for t in tensors:
            size = len(t.untyped_storage())
            if (size != t.nbytes or not t.is_contiguous()) and _reach(t) > size:
                return False
    except (NotImplementedError, RuntimeError):  # sparse, say
        return False
    return not any(map(_is_neg, tensors))


def is_opaque(t: Tensor) -> bool:
    """Whether it has no elements in memory that shape and strides describe: sparse, say."""
    try:
        t.untyped_storage(), t.stride()
    except (NotImplementedError, RuntimeError):
        return True
    return t._is_zerotensor()


def check(name: str, t: Tensor) -> None:
    """Raises ValueError where the tensor's storage is smaller than its shape and strides claim."""
    if not is_opaque(t) and (needed := _reach(t)) > (size := len(t.untyped_storage())):
        freed = " (was it freed, as by FSDP between forward passes?)" if size == 0 else ""
        raise ValueError(f"{name} of shape {tuple(t.shape)} needs {needed} bytes, and its storage has {size}{freed}")


def check_written(name: str, t: Tensor) -> None:
    """Raises ValueError where elements of a tensor that is written share memory."""
    if any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True)):
        raise ValueError(f"{name} is written, and its elements share memory: pass {name}.clone()")


def _reach(t: Tensor) -> int:
    """Bytes of the storage up to the tensor's last element."""
    last = t.storage_offset() + 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if not size:
            return 0
        last += (size - 1) * stride
    return last * t.element_size()
