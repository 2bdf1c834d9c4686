"""Layer norm as a module."""

from __future__ import annotations

from torch import Tensor, nn

from mplug2_fast.ops.add_layer_norm import add_layer_norm
from mplug2_fast.ops.layer_norm import layer_norm
from mplug2_fast.ops.linear_act import Activation
from mplug2_fast.ops.residual import norm_linear_residual


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis, by `mplug2_fast.ops.layer_norm`; same arguments, same state dict.

    Args:
        dim: channels. eps: added to the variance. elementwise_affine, bias: as in PyTorch.
    """

    def __init__(self, dim: int, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=elementwise_affine, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x and result: `(..., dim)`."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps)

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        """The norm of x + update, both `(..., dim)`, in one pass."""
        return add_layer_norm(x, update, self.weight, self.bias, eps=self.eps)

    def then(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none"
    ) -> tuple[Tensor, Tensor]:
        """The linear layer of weight `(outputs, dim)` and bias `(outputs,)` and its activation, after the norm, and the
        norm itself."""
        return norm_linear_residual(x, self.weight, self.bias, weight, bias, activation, self.eps)
