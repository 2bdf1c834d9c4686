"""Whether a tensor's memory holds what its shape and strides claim."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


def is_sound(tensors: Iterable[Tensor]) -> bool:
    """Whether kernels may read all of them as they are. Cheap: every call asks."""
    for t in tensors:
        try:
            size = len(t.untyped_storage())
        except (NotImplementedError, RuntimeError):
            return False
        if (size != t.nbytes or not t.is_contiguous()) and not is_opaque(t) and _reach(t) > size:
            return False
        if t.is_neg():
            return False
    return True


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
    shape: Sequence[int] = t.shape
    if 0 in shape:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(shape, t.stride(), strict=True))
    return (t.storage_offset() + last + 1) * t.element_size()
