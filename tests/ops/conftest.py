import functools
import inspect
from typing import Any

from mplug2_fast.ops import gpu
from tests.ops.suite import pytest_generate_tests

__all__ = ["pytest_generate_tests"]

if gpu.INTERPRETED:
    from triton.runtime import interpreter

    @functools.cache
    def _builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if interpreter.tl.core.is_builtin(member)]

    def _patch_builtin(package: Any, *others: Any) -> None:
        for name in _builtins(package):
            if interpreter.tl.core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, *others)

    # Triton's own looks through its whole language whenever a function is called, which takes a third of the time.
    interpreter._patch_builtin = _patch_builtin
