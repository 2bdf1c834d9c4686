"""Linear layer with its activation against the product alone."""

from collections.abc import Callable
from typing import Any

from bench.ops.baseline import Arguments, Baseline, linear


def product(arguments: Arguments) -> Callable[[], Any]:
    x, weight, bias = (arguments[name] for name in ("x", "weight", "bias"))
    return lambda: linear(x, weight, bias)


BASELINES = (Baseline("GEMM", product),)
