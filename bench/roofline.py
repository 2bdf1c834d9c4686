"""Where a measurement stands under the two ceilings of its machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from bench.row import Row


class Place(NamedTuple):
    """None is what needs no arithmetic, no bytes, or a ceiling that was not measured."""

    tflops: float | None
    gb_per_second: float | None
    percent_of_ceiling: float | None
    bound: str | None


def place(flop: int | None, bytes: int | None, seconds: float, dtype: str, ceilings: Mapping[str, Any]) -> Place:
    """The rates of a work, and how near it comes to the ceiling that binds it.

    The ceilings are those of `bench.ceilings.measure`: the best matrix product of the dtype, and a copy. Neither the
    arithmetic nor the traffic can take less than at its ceiling; the longer of the two times binds.
    """
    gemm = ceilings.get("gemm", {}).get(dtype)
    least = {
        "compute": flop / gemm["gflops"] / 1e9 if flop and gemm else 0.0,
        "memory": bytes / ceilings["copy_gb_per_second"] / 1e9 if bytes else 0.0,
    }
    bound = max(least, key=least.__getitem__)
    return Place(
        flop / seconds / 1e12 if flop else None,
        bytes / seconds / 1e9 if bytes else None,
        100 * least[bound] / seconds if least[bound] else None,
        bound if least[bound] else None,
    )


def under(row: Row, ceilings: Mapping[str, Any]) -> Row:
    """The row, placed under these ceilings."""
    return replace(row, **place(row.flop, row.bytes, row.seconds, row.key.dtype, ceilings)._asdict())
