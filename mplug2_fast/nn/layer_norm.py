"""Layer norm as a module."""

from __future__ import annotations

from torch import Tensor, nn

from mplug2_fast.nn.unchanged import unchanged
from mplug2_fast.ops.add_layer_norm import add_layer_norm
from mplug2_fast.ops.layer_norm import layer_norm


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis, with the same arguments and state dict.

    Args:
        dim: channels.
        eps: added to the variance.
        elementwise_affine, bias: as in PyTorch.
    """

    def __init__(self, dim: int, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=elementwise_affine, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x and result: `(..., dim)`."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps)

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        """Normalises x + update, both `(..., dim)`, in one pass."""
        return norm_of_sum(self, x, update)


NORMS = frozenset((nn.LayerNorm, LayerNorm))


def norm_of_sum(norm: nn.Module, x: Tensor, update: Tensor) -> Tensor:
    """norm(x + update), in one pass if the norm is an unchanged layer norm."""
    if not unchanged(NORMS, norm):
        return norm(x + update)
    return add_layer_norm(x, update, norm.weight, norm.bias, eps=norm.eps)
