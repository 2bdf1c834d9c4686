"""What the native CPU kernels ask of tensors, and how those are handed to them."""

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

DTYPES = (torch.float32, torch.bfloat16)
ISA_VARIABLE = "MPLUG2_FAST_ISA"

_WORK_OF_A_THREAD = 1 << 15
"""Elements below which waking another thread costs more than it saves."""


def threads(work: int) -> int:
    """How many threads to give a kernel that touches this many elements: PyTorch's number, or fewer."""
    return 1 if work < 2 * _WORK_OF_A_THREAD else min(torch.get_num_threads(), work // _WORK_OF_A_THREAD)


def available() -> bool:
    return native() is not None


def module() -> ModuleType:
    """The native module, which is known to be there."""
    found = native()
    assert found is not None
    return found


@functools.cache
def isa() -> Any:
    """The instruction set that kernels use: the best that the processor has, or the one that MPLUG2_FAST_ISA names.

    Raises:
        ConfigError: there is no instruction set of that name, or the processor lacks it.
    """
    _C = module()
    if name := os.environ.get(ISA_VARIABLE):
        try:
            return _C.isa_named(name)
        except ValueError as error:
            raise ConfigError(f"{ISA_VARIABLE}: {error}") from error
    return [isa for isa in _C.Isa.__members__.values() if _C.is_supported(isa)][-1]


def reasons(x: Tensor, **others: Tensor | None) -> list[str]:
    """Why native kernels cannot serve: no module, another type than float32 or bfloat16, several types, or channels
    that do not lie side by side. `x` and the others are arguments of the operator; None counts for nothing."""
    found, dtype = [], x.dtype
    if error := native_error():
        found.append(str(error))
    if dtype not in DTYPES:
        found.append(f"native kernels are for float32 and bfloat16, not {dtype}")
    for name, other in others.items():
        if other is not None:
            if other.dtype is not dtype:
                found.append(f"{name} is {other.dtype}, the first argument {dtype}")
            if not (other.is_contiguous() or dense(other)):
                found.append(f"the last axis of {name} has stride {other.stride(-1)}, not 1")
    if not (x.is_contiguous() or dense(x)):
        found.append(f"the last axis of the first argument has stride {x.stride(-1)}, not 1")
    return found


def parameter_reasons(x: Tensor, parameters: Iterable[Tensor | None]) -> list[str]:
    """Why x and parameters of other types do not go together."""
    dtypes = {p.dtype for p in parameters if p is not None}
    if dtypes.issubset((x.dtype,)):
        return []
    return [f"x is {x.dtype}, the parameters are {', '.join(sorted(map(str, dtypes)))}"]


def dense(x: Tensor) -> bool:
    """Whether the elements of the last axis lie side by side."""
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def activation(name: str) -> Any:
    """The activation of that name as the kernels take it."""
    return getattr(module().Activation, name)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
