"""Linear layers with e4m3 weights, for inference on a GPU."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from mplug2_fast.nn.eight_bit import EightBitLinear
from mplug2_fast.nn.layer_norm import NORMS
from mplug2_fast.nn.unchanged import unchanged
from mplug2_fast.ops.linear_act import Activation
from mplug2_fast.ops.linear_fp8 import linear_fp8, quantise_weight


class Fp8Linear(EightBitLinear):
    """A linear layer with an e4m3 weight. Its inputs become e4m3 in the kernel that computes the norm before it."""

    quantise_weight = staticmethod(quantise_weight)

    def forward(
        self,
        x: Tensor,
        activation: Activation = "none",
        *,
        residual: Tensor | None = None,
        norm: nn.Module | None = None,
        rows: slice | None = None,
        many: bool = False,
    ) -> Tensor:
        weight, bias, scale = self.parts(rows)
        fused = {}
        if norm is not None and unchanged(NORMS, norm) and norm.weight is not None:
            fused = {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
        elif norm is not None:
            x = norm(x)
        return linear_fp8(x, weight, scale, bias, activation, residual=residual, **fused)


is_fp8 = functools.partial(unchanged, frozenset((Fp8Linear,)))
"""Whether all of these layers are unchanged linear layers with e4m3 weights."""
