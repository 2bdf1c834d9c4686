"""Linear layers and embeddings with int8 weights, for inference on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mplug2_fast.nn.eight_bit import EightBitLinear, EightBitWeight
from mplug2_fast.nn.unchanged import unchanged
from mplug2_fast.ops.linear_act import Activation
from mplug2_fast.ops.linear_int8 import linear_int8, quantise_weight

if TYPE_CHECKING:
    from typing_extensions import Self


class Int8Linear(EightBitLinear):
    """A linear layer with an int8 weight. See `ops.linear_int8` for the bits of its inputs."""

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
        x = x if norm is None else norm(x)
        return linear_int8(x, weight, scale, bias, activation, residual=residual, bits=8 if many else self.bits)


class Int8Embedding(EightBitWeight):
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
"""Whether all of these layers are unchanged linear layers with int8 weights."""
