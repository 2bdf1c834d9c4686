"""The three-way tolerance: our error against float64 is at most twice that of the same-dtype eager code."""

from __future__ import annotations

import torch
from torch import Tensor


def relative(actual: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm; absolute where the exact value is smaller than 1 (or zero)."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    if exact.numel() == 0:
        return 0.0
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1.0)).item()


def assert_close_enough(ours: Tensor, eager: Tensor, exact: Tensor, noise_floor: float, what: str) -> None:
    """Ours against the exact values, given the error of eager code; whole numbers and infinities must be the same."""
    if not exact.is_floating_point():
        assert torch.equal(ours, exact), what
        return
    finite = exact.isfinite()
    assert torch.equal(ours[~finite].double(), exact[~finite]), f"{what}: infinities differ"
    ours, eager, exact = (t.where(finite, t.new_zeros(())) for t in (ours, eager, exact))
    error, bound = relative(ours, exact), 2 * relative(eager, exact) + noise_floor
    assert error <= bound, f"{what}: {error:.2e} > {bound:.2e}"
