"""Finds and counts the calls that are too small to gain.

A small model has many of them, and each may cost no more than a call of the original module. So native code does most
of this, and also computes such calls of linear layers and layer norms: it saves PyTorch's search for parameters, which
takes longer than finding out that a call is small.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional as F

from mplug2_fast.acceleration import int8
from mplug2_fast.acceleration.gain import TooSmall
from mplug2_fast.ops.runtime.memory import PLAIN_TYPES, dtype_code, native_tests

STATE = "_mplug2_fast"


class SmallCalls:
    """The small calls of one swapped module. The native class of this name replaces it.

    Attributes:
        count: small calls so far.
    """

    def __init__(self, limits: TooSmall) -> None:
        self.count, self._limits = 0, limits

    def add(self, x: Any) -> bool:
        """Counts a call if x is exactly a Tensor or a Parameter and too small, and returns whether."""
        small = type(x) in PLAIN_TYPES and self._limits.has(x)
        self.count += small
        return small


def small_calls(limits: TooSmall, flags: bytearray) -> Any:
    """The small calls of a module.

    Args:
        flags: native code sets the first one to whether the last small call of a linear layer had many rows.
    """
    native = connected()
    if native is None:
        return SmallCalls(limits)
    ranges = tuple((dtype_code(dtype), small.start, small.stop) for dtype, small in limits.on_cpu.items())
    return native.SmallCalls(limits.anywhere, ranges, limits.few_in_loops_only, flags)


@functools.cache
def connected() -> Any:
    """The native module, if it can find small calls."""
    native = native_tests()
    if native is not None:
        code = getattr(F.layer_norm, "__code__", None)  # somebody may have replaced the function
        own = F.layer_norm if code is not None and code.co_filename == F.__file__ else None
        tests = torch._C._is_torch_function_mode_enabled, torch.is_autocast_enabled
        native.connect_small_calls(STATE, int8.FEEDS, F, own, torch.layer_norm, *tests)
    return native
