import functools
import inspect
from typing import Any

import numpy as np

from mplug2_fast.ops.runtime import triton
from tests.ops.suite import pytest_generate_tests

__all__ = ["pytest_generate_tests"]

if triton.INTERPRETED:
    from triton.runtime import interpreter

    @functools.cache
    def _builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if interpreter.tl.core.is_builtin(member)]

    def _patch_builtin(package: Any, *others: Any) -> None:
        for name in _builtins(package):
            if interpreter.tl.core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, *others)

    def _create_dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
        wide = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + acc.data
        return interpreter.TensorHandle(wide.astype(acc.data.dtype), acc.dtype.scalar)

    # NumPy's float32 products sum in an order that depends on the processor and on the shape. Two products of the same
    # rows then differ where a GPU's are equal, and attention's backward subtracts one from the other.
    interpreter.InterpreterBuilder.create_dot = _create_dot

    # Triton's own looks through its whole language whenever a function is called, which takes a third of the time.
    interpreter._patch_builtin = _patch_builtin
