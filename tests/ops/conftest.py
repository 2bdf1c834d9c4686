from mplug2_fast.ops.runtime import triton
from tests.ops.suite import pytest_generate_tests

__all__ = ["pytest_generate_tests"]

if triton.INTERPRETED:
    from tests.ops import interpreter  # noqa: F401
