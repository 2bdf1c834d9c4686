"""Linear layers and embeddings with 8-bit weights, for inference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mplug2_fast.nn.unchanged import unchanged
from mplug2_fast.ops.linear_act import Activation
from mplug2_fast.ops.linear_int8 import linear_int8, quantise_weight

if TYPE_CHECKING:
    from typing_extensions import Self


class Int8Weight(nn.Module):
    """Has a weight `(rows, channels)`, int8, and the scale of each row, `(rows,)`, float32."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Scales stay float32, whatever the dtype of the model becomes."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self


class Int8Linear(Int8Weight):
    """A linear layer with an 8-bit weight. It has no gradients.

    Args:
        weight: `(out_features, in_features)`, int8. scale: `(out_features,)`, float32. bias: `(out_features,)` or None.
        bits: to which inputs are rounded, 8 or 16: see `ops.linear_int8`.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int = 8) -> None:
        super().__init__(weight, scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.bits = bits

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, bits: int = 8) -> Self:
        """A layer that rounds a floating-point weight, of which the axes from the second on are one."""
        return cls(*quantise_weight(weight.flatten(1)), bias, bits)

    def forward(
        self,
        x: Tensor,
        activation: Activation = "none",
        *,
        residual: Tensor | None = None,
        rows: slice | None = None,
        bits: int | None = None,
    ) -> Tensor:
        """`residual + activation(product)` of x `(..., in_features)`.

        Args:
            rows: of the weight, if not all. bits: in place of the layer's.
        """
        weight, scale, bias = self.weight, self.scale, self.bias
        if rows is not None:
            weight, scale, bias = weight[rows], scale[rows], None if bias is None else bias[rows]
        return linear_int8(x, weight, scale, bias, activation, residual=residual, bits=bits or self.bits)

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight, bias and scale."""
        return self.weight, self.bias, self.scale

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}, bias={self.bias is not None}, bits={self.bits}"


class Int8Embedding(Int8Weight):
    """A table of embeddings in 8 bits, which also scores the words. It has no gradients.

    Args:
        weight: `(words, channels)`, int8. scale: `(words,)`, float32. dtype: of embeddings; follows that of the model.
    """

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight, scale)
        self.dtype = dtype

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """A table that rounds a floating-point one."""
        return cls(*quantise_weight(weight), weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids `(...)` to embeddings `(..., channels)`."""
        return (self.weight[ids] * self.scale[ids][..., None]).to(self.dtype)

    def logits(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The products of x `(..., channels)` with all words, plus the bias `(words,)`: `(..., words)`."""
        return linear_int8(x, self.weight, self.scale, bias, bits=16)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        words, channels = self.weight.shape
        return f"{words}, {channels}, dtype={self.dtype}"


is_int8 = functools.partial(unchanged, frozenset((Int8Linear,)))
"""Whether all of these layers are unchanged layers with 8-bit weights."""
