"""What layers with 8-bit weights have in common, for inference. Their formats are in `int8` and `fp8`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mplug2_fast.ops.linear_act import Activation

if TYPE_CHECKING:
    from typing_extensions import Self


class EightBitWeight(nn.Module):
    """Has a weight `(rows, channels)` of 8 bits, and the scale of each row, `(rows,)`, float32."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Both keep their dtypes, whatever the dtype of the model becomes."""
        before = {"weight": self.weight, "scale": self.scale}
        super()._apply(fn, recurse)
        for name, old in before.items():
            if (new := getattr(self, name)).dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


class EightBitLinear(EightBitWeight):
    """A linear layer with an 8-bit weight. It has no gradients. Derived classes have a format, and compute `forward`.

    Args:
        weight: `(out_features, in_features)`. scale: `(out_features,)`, float32. bias: `(out_features,)` or None.
        bits: to which inputs are rounded, 8 or 16.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int = 8) -> None:
        super().__init__(weight, scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.bits = bits

    @staticmethod
    def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and scales of a weight `(out_features, in_features)`."""
        raise NotImplementedError

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, bits: int = 8) -> Self:
        """A layer that rounds a floating-point weight, of which the axes from the second on are one."""
        return cls(*cls.quantise_weight(weight.flatten(1)), bias, bits)

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
        """`residual + activation(product)` of x `(..., in_features)`.

        Args:
            norm: a layer norm that x goes through first.
            rows: of the weight, if not all. many: x is a memory of many tokens, which 8 bits suffice for.
        """
        raise NotImplementedError

    def parts(self, rows: slice | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight, bias and scale, or some rows of them."""
        weight, bias, scale = self.weight, self.bias, self.scale
        if rows is None:
            return weight, bias, scale
        return weight[rows], None if bias is None else bias[rows], scale[rows]

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}, bias={self.bias is not None}, bits={self.bits}"
