"""Comparing the gradients of two models without holding both, or writing gigabytes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from bench.weights import seeded_noise

# Of the largest gradient's norm. What is below is zero but for rounding: a shift of all scores of a query changes
# nothing, so the biases of keys have no gradient.
ZERO = 1e-6


def sketch(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every gradient times a vector of seeded noise, and so one number a row. The norm of a difference of such products
    is on average that of the difference of the gradients."""
    return {
        name: gradient.flatten(1).float().cpu() @ seeded_noise(name, gradient[0].numel())
        if gradient.dim() > 1
        else gradient.float().cpu()
        for name, gradient in gradients.items()
    }


def relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The root mean square of the parameters' relative errors: a small gradient counts as much as a large one."""
    norms = {name: float(value.double().norm()) for name, value in expected.items()}
    least = ZERO * max(norms.values())
    errors = [
        float((found[name].double() - expected[name].double()).norm()) / norm
        for name, norm in norms.items()
        if norm > least
    ]
    error = math.sqrt(sum(error**2 for error in errors) / len(errors))
    return error if error == error else math.inf
