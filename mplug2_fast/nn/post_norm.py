"""The steps of a BERT layer, whatever its modules are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mplug2_fast.nn.attention import MultiHeadAttention, calm_padding
from mplug2_fast.nn.layer_norm import LayerNorm


class PostNormLayer(nn.Module):
    """Self-attention, cross-attention where there is a memory, FFN; after each the residual and a layer norm.

    A subclass has, as modules, properties or methods:

        dropout: on what each step adds. attention_norm, cross_norm, mlp_norm: the norm after each step.
        attention: called and projecting like `SelfAttention`.
        cross: projecting and attending like `CrossAttention`; None, as `cross_norm`, where there is none.
        mlp: called like `MLP`.
    """

    dropout: nn.Dropout
    attention: Any
    attention_norm: LayerNorm
    cross: MultiHeadAttention | None
    cross_norm: LayerNorm | None
    mlp: Callable[..., Tensor]
    mlp_norm: LayerNorm

    def add_norm(self, norm: LayerNorm, x: Tensor, step: Callable[[Tensor | None], Tensor]) -> Tensor:
        """norm(x + step). The step takes the residual that it adds itself: x, or None where its result is dropped out
        first."""
        if self.training and self.dropout.p > 0:
            return norm.add(x, self.dropout(step(None)))
        return norm(step(x))

    def attend_self(self, x: Tensor, *, key_padding_mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """The self-attention step of x `(..., tokens, hidden)`."""
        x = calm_padding(x, key_padding_mask)
        return self.add_norm(
            self.attention_norm,
            x,
            lambda residual: self.attention(x, key_padding_mask=key_padding_mask, causal=causal, residual=residual),
        )

    def attend_cross(
        self, x: Tensor, memory: Tensor, *, key_padding_mask: Tensor | None = None, query: Tensor | None = None
    ) -> Tensor:
        """The cross-attention step of x `(..., tokens, hidden)` to memory `(..., keys, hidden)`; `query` is
        `cross.project_query(x)` where that is known already."""
        if self.cross is None:
            raise ValueError("there is a memory, and this layer was built without cross-attention")
        query = self.cross.project_query(x) if query is None else query
        return self.add_norm(
            self.cross_norm,
            x,
            lambda residual: self.cross.attend(query, memory, key_padding_mask=key_padding_mask, residual=residual),
        )

    def feed_forward(self, x: Tensor) -> Tensor:
        """The FFN step of x `(..., hidden)`."""
        return self.add_norm(self.mlp_norm, x, lambda residual: self.mlp(x, residual=residual is not None))

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """x and result `(..., tokens, hidden)`, any leading axes or none; memory `(..., keys, hidden)` with the same
        leading axes; key_padding_mask `(..., tokens)` and memory_mask `(..., keys)`, nonzero for tokens. Without a
        memory the cross-attention is passed by.

        Raises:
            ValueError: shapes that do not go together, or a memory for a layer without cross-attention.
        """
        x = self.attend_self(x, key_padding_mask=key_padding_mask, causal=causal)
        if memory is not None:
            x = self.attend_cross(x, memory, key_padding_mask=memory_mask)
        return self.feed_forward(x)
