"""From runs to the rows of the table and of the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.plan import Plan
from bench.workers import Spec

if TYPE_CHECKING:
    from bench.measure import Measured


@dataclass(frozen=True)
class Row:
    """One line of results. None is what does not apply or was not measured.

    Attributes:
        name: the sizes of the work.
        gflops: needed GFLOP a second; the same count for all implementations, whatever they really do.
        percent_of_ceiling: of the best GEMM rate of the same dtype, measured in the same run.
        x_reference, x_compiled: how many times faster than the float32 reference; than the peer in the same dtype.
        peak_memory_bytes: of the whole process on the CPU, weights and libraries included; of the allocator on CUDA.
        relative_error: against the float32 reference: of hidden states, and of sequence scores where it decodes.
    """

    level: str
    name: str
    implementation: str
    dtype: str
    device: str
    seconds: float
    gflops: float | None
    percent_of_ceiling: float | None
    x_reference: float | None
    x_compiled: float | None
    peak_memory_bytes: int | None
    relative_error: float | None
    backend: str
    command: str

    @classmethod
    def of_loading(cls, plan: Plan, seconds: float, backend: str) -> Row:
        """The row for loading the frames of the input file, on the CPU."""
        return cls(
            level="loading",
            name=f"{plan.frames} frames of {plan.config.vision.image_size} pixels",
            implementation="fast",
            dtype="float32",
            device="cpu",
            seconds=seconds,
            gflops=None,
            percent_of_ceiling=None,
            x_reference=None,
            x_compiled=None,
            peak_memory_bytes=None,
            relative_error=None,
            backend=backend,
            command=plan.command(plan.levels[0], plan.dtypes[0]),
        )


def tabulate(plan: Plan, results: Mapping[Spec, Mapping[str, Measured]], ceilings: Mapping[str, Any]) -> list[Row]:
    """The rows of one group of workers, by level, the reference first."""
    rows = []
    for level in plan.levels:
        seconds = {(spec.implementation, spec.dtype): runs[level].median for spec, runs in results.items()}
        reference = seconds["reference", "float32"]
        for spec, runs in results.items():
            measured, kind = runs[level], spec.implementation
            peer = seconds.get((plan.peer or "", spec.dtype))
            rate = plan.needed_flop(kind, level) / measured.median / 1e9
            comparable = kind == "reference" or not plan.decodes_less("reference", level)
            rows.append(
                Row(
                    level=level,
                    name=plan.name(kind, level),
                    implementation="compiled" if kind == "frozen" else kind,
                    dtype=spec.dtype,
                    device=spec.device,
                    seconds=measured.median,
                    gflops=rate,
                    percent_of_ceiling=100 * rate / ceilings["gemm"][spec.dtype]["gflops"],
                    x_reference=reference / measured.median,
                    x_compiled=None if peer is None else peer / measured.median,
                    peak_memory_bytes=measured.peak_memory_bytes,
                    relative_error=measured.relative_error if comparable else None,
                    backend=measured.backend,
                    command=plan.command(level, spec.dtype),
                )
            )
    return rows
