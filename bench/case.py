"""A piece of work and the ways to do it, as every level hands it to the measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bench.row import Key

OURS = "ours"


@dataclass(frozen=True)
class Call:
    """What is timed: `run(*before())`, of which `before` is outside the clock.

    Attributes:
        replays: whether `run` replays a CUDA graph of its own, which no other can capture.
    """

    run: Callable[..., Any]
    before: Callable[[], tuple[Any, ...]] = tuple
    replays: bool = False

    def __call__(self) -> Any:
        return self.run(*self.before())


@dataclass(frozen=True)
class Agreement:
    """Relative errors: ours, the most that is allowed, and those of baselines that have one."""

    ours: float
    allowed: float
    baselines: Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """One work. Building it is outside the clock; a way is prepared when it is first asked for.

    Attributes:
        ways: "ours" and the baselines of `bench.row.Row`, each to its calls: one, or several on inputs that lie apart,
            so that none finds its own in the cache. All ways have as many calls.
        flop, bytes: needed.
        agreement: compares the results.
        backend: what serves ours.
    """

    key: Key
    ways: Mapping[str, Callable[[], list[Call]]]
    flop: int
    bytes: int
    agreement: Callable[[], Agreement]
    backend: str


def agreement(
    ours: Any, exact: Any, same_dtype: Any, floor: float, others: Mapping[str, Any] | None = None
) -> Agreement:
    """The three-way comparison: ours may be off by twice what eager code in the same dtype is, and a floor for noise.

    Args:
        ours, exact, same_dtype: tensors, or tuples of them. `same_dtype` is what eager code gives.
        others: baseline -> its result.
    """
    eager = relative_error(same_dtype, exact)
    errors = {"eager": eager, **{name: relative_error(out, exact) for name, out in (others or {}).items()}}
    return Agreement(relative_error(ours, exact), 2 * eager + floor, errors)


def relative_error(out: Any, exact: Any) -> float:
    """Of all floating-point tensors together; infinite where whole numbers or shapes differ, or something is NaN."""
    difference = norm = 0.0
    for o, e in zip(tensors(out), tensors(exact), strict=True):
        if o.shape != e.shape:
            return math.inf
        if not e.is_floating_point():
            if not bool((o == e).all()):
                return math.inf
            continue
        o, e = o.detach().double().cpu(), e.detach().double().cpu()
        same = o == e  # infinities, too
        difference += float((o - e).masked_fill(same, 0).square().sum())
        norm += float(e.masked_fill(e.isinf(), 0).square().sum())
    error = math.sqrt(difference) / max(math.sqrt(norm), 1e-30)
    return error if error == error else math.inf


def tensors(value: Any) -> Iterable[Tensor]:
    return [value] if isinstance(value, Tensor) else [each for each in value if each is not None]
