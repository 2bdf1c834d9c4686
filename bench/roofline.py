"""Where a time lies under the two ceilings of its machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def place(
    flop: int, bytes: int, seconds: float, dtype: str, ceilings: Mapping[str, Any]
) -> tuple[float, float, float, str]:
    """(TFLOP/s, GB/s, percent of the ceiling that binds, "compute" or "memory")."""
    compute = flop / (ceilings["gemm"][dtype]["gflops"] * 1e9)
    memory = bytes / (ceilings["copy_gb_per_second"] * 1e9)
    attainable, bound = max((compute, "compute"), (memory, "memory"))
    return flop / seconds / 1e12, bytes / seconds / 1e9, 100 * attainable / seconds, bound
