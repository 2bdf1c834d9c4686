"""Whether kernels may read a tensor's memory as it is."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mplug2_fast._native import native

PLAIN_TYPES = frozenset((Tensor, Parameter))

_TORCH_FUNCTIONS = (
    "aoti_torch_get_layout",
    "aoti_torch_get_storage_size",
    "aoti_torch_get_storage_offset",
    "aoti_torch_get_dtype",
    "aoti_torch_get_numel",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_data_ptr",
    "aoti_torch_dtype_element_size",
    "aoti_torch_layout_strided",
    "aoti_torch_get_device_type",
    "aoti_torch_device_type_cpu",
)
"""The parts of PyTorch's C interface that the native module calls."""


PLAIN, REQUIRES_GRAD, ON_CPU = 1, 2, 4


def facts(values: tuple[Any, ...]) -> int:
    """What is known about an operator's arguments, as a sum of flags. Fast, because every call of an operator asks.

    PLAIN: all tensors among them are exactly Tensor or Parameter, fit their storage and have no pending minus sign.
    REQUIRES_GRAD: a tensor requires gradients. ON_CPU: all tensors are on the CPU. Without PLAIN the sum is 0.
    """
    module = native_tests()
    if module is not None:
        return module.facts(values)
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not all(map(_is_plain, tensors)):
        return 0
    requires_grad = any(t.requires_grad for t in tensors)
    return PLAIN + requires_grad * REQUIRES_GRAD + all(t.is_cpu for t in tensors) * ON_CPU


@functools.cache
def native_tests() -> Any:
    """The native module, if it and PyTorch have what the tests need."""
    module, library = native(), _library()
    if not hasattr(module, "facts") or not all(hasattr(library, name) for name in _TORCH_FUNCTIONS):
        return None
    addresses = {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in _TORCH_FUNCTIONS}
    module.connect_torch(addresses, Tensor, Parameter, torch.dtype)
    return module


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(torch._C.__file__)


def dtype_code(dtype: torch.dtype) -> int:
    """PyTorch's number of a type. Call it only where `native_tests()` holds."""
    return getattr(_library(), f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")()


def _is_plain(t: Tensor) -> bool:
    try:
        size = len(t.untyped_storage())
        if (size != t.nbytes or not t.is_contiguous()) and _reach(t) > size:
            return False
    except (NotImplementedError, RuntimeError):  # sparse tensors, for example
        return False
    return type(t) in PLAIN_TYPES and not t.is_neg() and not t._is_zerotensor()


def is_opaque(t: Tensor) -> bool:
    """Whether shape and strides do not describe its elements in memory, as for sparse tensors."""
    try:
        t.untyped_storage(), t.stride()
    except (NotImplementedError, RuntimeError):
        return True
    return t._is_zerotensor()


def check(name: str, t: Tensor) -> None:
    """Raises ValueError if the tensor's storage is smaller than its shape and strides need."""
    if not is_opaque(t) and (needed := _reach(t)) > (size := len(t.untyped_storage())):
        freed = " (was it freed, as by FSDP between forward passes?)" if size == 0 else ""
        raise ValueError(f"{name} of shape {tuple(t.shape)} needs {needed} bytes, and its storage has {size}{freed}")


def check_written(name: str, t: Tensor) -> None:
    """Raises ValueError if elements of a tensor that the operator writes share memory."""
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
