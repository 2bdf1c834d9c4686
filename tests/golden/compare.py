"""Compares what an implementation computed with what a golden case expects, quantity by quantity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Measure = Callable[[Tensor, Tensor], float]
"""(actual, expected), both float64 and of one shape -> the error."""


def frobenius(actual: Tensor, expected: Tensor, smallest: float = 0.0) -> float:
    """Frobenius norm of the difference, divided by that of `expected`; or the largest error of an entry, if greater.

    The error of an entry is relative to the sum of its size and the root mean square of `expected`. It shows a single
    wrong entry among many. The root mean square counts as at least `smallest`.
    """
    difference = _difference(actual, expected).abs()
    if not difference.any():
        return 0.0
    expected = expected.nan_to_num(nan=0, posinf=0, neginf=0)
    root_mean_square = expected.square().mean().sqrt().clamp(min=smallest)
    largest = (difference / (root_mean_square + expected.abs())).nan_to_num(nan=0, posinf=torch.inf).max()
    norm = difference.square().mean().sqrt() / root_mean_square
    return torch.maximum(norm, largest).item()


def gradient(actual: Tensor, expected: Tensor) -> float:
    """`frobenius` with a floor, because a key's bias has a gradient of zero, up to rounding."""
    return frobenius(actual, expected, smallest=3e-4)


def absolute(actual: Tensor, expected: Tensor) -> float:
    """The largest difference."""
    return _difference(actual, expected).abs().max().item()


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of an entry, divided by the expected entry."""
    difference = _difference(actual, expected).abs()
    return torch.where(difference == 0, 0.0, difference / expected.abs()).max().item()


def differing(actual: Tensor, expected: Tensor) -> float:
    """The number of entries that differ."""
    return float((_difference(actual, expected) != 0).sum())


def _difference(actual: Tensor, expected: Tensor) -> Tensor:
    """Zero where both are the same infinity, or both are NaN."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    return torch.where(same, 0.0, actual - expected)


@dataclass(frozen=True)
class Tolerance:
    measure: Measure
    limit: float


HIDDEN_STATES = Tolerance(frobenius, 1e-4)
EXACT = Tolerance(differing, 0)
TOLERANCES = {
    "beam_scores": Tolerance(absolute, 1e-3),
    "rank_probs": Tolerance(absolute, 1e-4),
    **dict.fromkeys(("loss", "scst_loss", "caption_loss", "loss_ita", "loss_itm"), Tolerance(relative, 1e-4)),
    **dict.fromkeys(("grad:", "scst_grad:"), Tolerance(gradient, 1e-3)),
    **dict.fromkeys(("metric:", "accuracy"), Tolerance(absolute, 1e-6)),
    **{f"augment:{name}": Tolerance(absolute, 1) for name in ("ShearX", "ShearY", "Rotate")},  # rounding of a warp
    "pixels": Tolerance(absolute, 1e-6),
    "train_pixels": Tolerance(absolute, 1e-6),
}
"""By the name of a quantity, or of its group (see `group`). The rest are hidden states; integers must be equal."""


def group(name: str) -> str | None:
    """`"grad:"` of `"grad:KEY"`. A case stores some members of a group, and every other quantity of its kind."""
    head, colon, _ = name.partition(":")
    return head + colon if colon else None


@dataclass(frozen=True)
class Comparison:
    """How one quantity compares. `problem` says why it was not compared."""

    name: str
    error: float = float("nan")
    limit: float = float("nan")
    problem: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # false for NaN

    def line(self, width: int) -> str:
        """A row of a table whose names take `width` columns."""
        figures = self.problem or f"{self.error:<9.2g}  {self.limit:g}"
        return f"{'ok' if self.ok else 'FAILED':6}  {self.name:{width}}  {figures}"


def compare(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerances: Mapping[str, Tolerance] = TOLERANCES
) -> list[Comparison]:
    """Each quantity of `expected`, then those that `expected` lacks.

    Args:
        actual: every quantity of the case's kind; of a group all members.
    """
    compared = [_compare(name, actual, expected[name], tolerances) for name in expected]
    needed = {group(name) or name for name in actual}
    missing = needed - {group(name) or name for name in expected}
    return compared + [Comparison(name, problem="missing from expected.npz") for name in sorted(missing)]


def _compare(
    name: str, actual: Mapping[str, Tensor], expected: Tensor, tolerances: Mapping[str, Tolerance]
) -> Comparison:
    if name not in actual:
        return Comparison(name, problem="not compared: nothing computes it")
    value = actual[name].detach()
    if value.shape != expected.shape:
        return Comparison(name, problem=f"shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
    if value.is_floating_point() != expected.is_floating_point():
        return Comparison(name, problem=f"{value.dtype}, expected {expected.dtype}")
    if not expected.numel():
        return Comparison(name, problem="not compared: it is empty")
    default = HIDDEN_STATES if expected.is_floating_point() else EXACT
    tolerance = tolerances.get(name) or tolerances.get(group(name) or "") or default
    return Comparison(name, tolerance.measure(value.double(), expected.double()), tolerance.limit)
