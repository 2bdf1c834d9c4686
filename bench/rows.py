"""From runs to the rows of the model's level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bench import roofline
from bench.case import OURS
from bench.plan import DECODING, Plan
from bench.row import Baseline, Row
from bench.turns import Turns
from bench.workers import Spec

if TYPE_CHECKING:
    from bench.measure import Measured

# Relative errors, see NOTES.md. In a narrow dtype a search may choose other words, which moves a score by as much
# whatever the dtype.
NOISE = 1e-5
SCORE_NOISE = 4e-2

Runs = Mapping[Spec, Mapping[str, "Measured"]]
"""By worker and task."""


def tabulate(plan: Plan, family: str, results: Runs, ceilings: Mapping[str, Any]) -> list[Row]:
    """The rows of one group of workers, by task and dtype."""
    ours = {spec: runs for spec, runs in results.items() if plan.baseline(spec.implementation) is None}
    return [
        row(plan, task, spec.dtype, runs[task], baselines(plan, task, spec.dtype, results), ceilings)
        for task in plan.tasks_of("fast", family)
        for spec, runs in ours.items()
    ]


def baselines(plan: Plan, task: str, dtype: str, results: Runs) -> dict[str, Measured]:
    """What the row of a task and dtype is compared with, in the order of `bench.plan.BASELINES`."""
    found = {}
    for spec, runs in results.items():
        name = plan.baseline(spec.implementation)
        if name and task in runs and (name == "reference" or spec.dtype == dtype):
            found[name] = runs[task]
    return found


def row(
    plan: Plan, task: str, dtype: str, ours: Measured, others: Mapping[str, Measured], ceilings: Mapping[str, Any]
) -> Row:
    flop, moved = plan.needed_flop(task), plan.needed_bytes(task, dtype)
    tflops, gb_per_second, percent, bound = roofline.place(flop, moved, ours.median, dtype, ceilings)
    judged = not plan.reference_decodes_less(task)
    error = ours.relative_error if judged else None
    allowed = allowed_error(task, dtype, others) if judged else None
    return Row(
        key=plan.key(task, dtype),
        seconds=ours.median,
        spread=Turns({OURS: ours.seconds}).spread(),
        runs=len(ours.seconds),
        flop=flop,
        bytes=moved,
        tflops=tflops,
        gb_per_second=gb_per_second,
        percent_of_ceiling=percent,
        bound=bound,
        baselines={name: baseline(ours, other, name, judged) for name, other in others.items()},
        peak_memory_bytes=ours.peak_memory_bytes,
        added_memory_bytes=ours.added_memory_bytes,
        relative_error=error,
        allowed_error=allowed,
        correct=within(error, allowed),
        backend=ours.backend,
        command=plan.command(task, dtype),
    )


def baseline(ours: Measured, other: Measured, name: str, judged: bool) -> Baseline:
    compared = judged and name != "reference"
    return Baseline(
        seconds=other.median,
        ratio=Turns({OURS: ours.seconds, name: other.seconds}).ratio(name),
        peak_memory_bytes=other.peak_memory_bytes,
        relative_error=other.relative_error if compared else None,
    )


def allowed_error(task: str, dtype: str, others: Mapping[str, Measured]) -> float | None:
    """Twice the error of the peer in the same dtype, eager if it ran, and a floor for noise; in float32 the floor alone
    where there is no peer, and otherwise None."""
    floor = noise_floor(task, dtype)
    for name in ("eager", "compiled"):
        error = others[name].relative_error if name in others else None
        if error is not None and math.isfinite(error):
            return 2 * error + floor
    return floor if dtype == "float32" else None


def noise_floor(task: str, dtype: str) -> float:
    """`NOISE` for thousands of values, whose error hardly varies. Where a score a video is all there is, the peer's is
    off by much or by nothing as chance has it, so that as much as is usual is allowed in any case."""
    return SCORE_NOISE if task in DECODING and dtype != "float32" else NOISE


def within(error: float | None, allowed: float | None) -> bool:
    """What there is no bound for has to be a number, at least."""
    return error is None or (math.isfinite(error) if allowed is None else error <= allowed)
