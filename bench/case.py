"""A piece of work and the ways to do it. All levels but the model's describe their work so."""

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
    """What is timed: `run(*before())`. `before` is outside the clock.

    Attributes:
        replays: whether `run` already replays a CUDA graph and cannot be captured in another.
    """

    run: Callable[..., Any]
    before: Callable[[], tuple[Any, ...]] = tuple
    replays: bool = False

    def __call__(self) -> Any:
        return self.run(*self.before())


@dataclass(frozen=True)
class Agreement:
    """Relative errors: ours, the largest allowed, and those of baselines."""

    ours: float
    allowed: float
    baselines: Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """One work. Building it is outside the clock. A way is prepared when it is first used.

    Attributes:
        ways: "ours" and the baselines of `bench.row.Row` -> their calls: one, or several on distant inputs, so that no
            input is in the cache. All ways have the same number of calls.
        flop, bytes: what the work needs.
        agreement: compares the results.
        backend: what runs ours.
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
    """The three-way comparison: our error may be twice that of eager code in the same dtype, plus a noise floor.

    Args:
        ours, exact, same_dtype: tensors, or tuples of them. `same_dtype` comes from eager code.
        others: baseline -> its result.
    """
    eager = relative_error(same_dtype, exact)
    errors = {"eager": eager, **{name: relative_error(out, exact) for name, out in (others or {}).items()}}
    return Agreement(relative_error(ours, exact), 2 * eager + floor, errors)


def relative_error(out: Any, exact: Any) -> float:
    """The error of all floating-point tensors together. Infinite if integers or shapes differ, or for NaN."""
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
