"""The MLP, with its norm, activation and residual, against its two products alone."""

from collections.abc import Callable
from typing import Any

from bench.ops.baseline import Arguments, Baseline, at_least
from mplug2_fast.ops import onednn


def products(arguments: Arguments) -> Callable[[], Any]:
    x, fc_weight, fc_bias, proj_weight, proj_bias = list(arguments.values())[:5]
    hidden = onednn.linear(x, fc_weight, fc_bias)

    def run() -> None:
        onednn.linear(x, fc_weight, fc_bias)
        onednn.linear(hidden, proj_weight, proj_bias)

    return run


BASELINES = (Baseline("two GEMMs", products, at_least(0.95)),)
