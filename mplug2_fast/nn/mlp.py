"""The feed-forward part of a transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from mplug2_fast.ops.linear_act import Activation
from mplug2_fast.ops.mlp import mlp


class MLP(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        dim: channels in and out. hidden: channels between. activation: `"gelu"` (erf), `"quick_gelu"` or `"none"`.
    """

    def __init__(self, dim: int, hidden: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.fc = nn.Linear(dim, hidden)
        self.proj = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, *, norm: nn.LayerNorm | None = None, residual: bool = False) -> Tensor:
        """x `(..., dim)`, through `norm` first where one is given; `residual` adds x to the result."""
        if norm is not None and (norm.weight is None or norm.bias is None):
            raise ValueError("norm must have a weight and a bias: apply another norm before the call")
        return mlp(
            x,
            self.fc.weight,
            self.fc.bias,
            self.proj.weight,
            self.proj.bias,
            activation=self.activation,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            eps=1e-5 if norm is None else norm.eps,
            residual=residual,
        )
