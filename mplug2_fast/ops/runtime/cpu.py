"""Input requirements of the native CPU kernels, and helpers to call them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mplug2_fast._native import native, native_error
from mplug2_fast.errors import ConfigError
from mplug2_fast.ops.runtime.memory import native_tests

DTYPES = (torch.float32, torch.bfloat16)
ISA_VARIABLE = "MPLUG2_FAST_ISA"

_WORK_OF_A_THREAD = 1 << 15
"""Minimum elements per thread: below, waking a thread costs more than it saves."""


def threads(work: int) -> int:
    """Threads for a kernel that touches this many elements: PyTorch's setting, or fewer."""
    return 1 if work < 2 * _WORK_OF_A_THREAD else min(torch.get_num_threads(), work // _WORK_OF_A_THREAD)


def available() -> bool:
    return native() is not None


def module() -> ModuleType:
    """The native module. Call it only where `available()` holds."""
    found = native()
    assert found is not None
    return found


@functools.cache
def isa() -> Any:
    """The instruction set that kernels use: the processor's best, or the one that MPLUG2_FAST_ISA names.

    Raises:
        ConfigError: unknown instruction set, or one that the processor lacks.
    """
    _C = module()
    if name := os.environ.get(ISA_VARIABLE):
        try:
            return _C.isa_named(name)
        except ValueError as error:
            raise ConfigError(f"{ISA_VARIABLE}: {error}") from error
    return [isa for isa in _C.Isa.__members__.values() if _C.is_supported(isa)][-1]


def multiplies_bytes() -> bool:
    """Whether kernels use instructions for products of bytes (VNNI)."""
    return available() and isa().name in ("avx512_vnni", "avx512_bf16")


def reasons(x: Tensor, **others: Tensor | None) -> list[str]:
    """Why native kernels cannot serve these arguments: no native module, a dtype other than float32 and bfloat16,
    different dtypes, or a last axis that is not dense."""
    found, dtype = [], x.dtype
    if error := native_error():
        found.append(str(error))
    elif dtype in DTYPES and (tests := native_tests()) is not None and tests.are_alike(x, *others.values()):
        return found
    if dtype not in DTYPES:
        found.append(f"native kernels support float32 and bfloat16, got {dtype}")
    for name, other in others.items():
        if other is not None:
            if other.dtype is not dtype:
                found.append(f"{name} is {other.dtype}, the first argument {dtype}")
            if not (other.is_contiguous() or dense(other)):
                found.append(f"the last axis of {name} must have stride 1, got {other.stride(-1)}")
    if not (x.is_contiguous() or dense(x)):
        found.append(f"the last axis of the first argument must have stride 1, got {x.stride(-1)}")
    return found


def parameter_reasons(x: Tensor, parameters: Iterable[Tensor | None]) -> list[str]:
    """A reason if x and the parameters have different dtypes."""
    if (tests := native_tests()) is not None and tests.are_alike(x, *parameters):
        return []
    dtypes = {p.dtype for p in parameters if p is not None}
    if not dtypes or dtypes == {x.dtype}:
        return []
    return [f"x is {x.dtype}, the parameters are {', '.join(sorted(map(str, dtypes)))}"]


def dense(x: Tensor) -> bool:
    """Whether the elements of the last axis are adjacent in memory."""
    return x.stride(-1) == 1 or x.shape[-1] <= 1


@functools.cache
def activation(name: str) -> Any:
    """The kernels' enum value for an activation."""
    return getattr(module().Activation, name)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
