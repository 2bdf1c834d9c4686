"""The MLP, with its norm, activation and residual, against its two products alone."""

from collections.abc import Callable
from typing import Any

from bench.ops.baseline import Arguments, Baseline, linear


def products(arguments: Arguments) -> Callable[[], Any]:
    x, fc_weight, fc_bias, proj_weight, proj_bias = list(arguments.values())[:5]
    hidden = linear(x, fc_weight, fc_bias)

    def run() -> None:
        linear(x, fc_weight, fc_bias)
        linear(hidden, proj_weight, proj_bias)

    return run


BASELINES = (Baseline("two GEMMs", products),)
