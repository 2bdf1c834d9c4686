"""The steps of a post-norm layer: each adds its result to its input and normalises the sum."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mplug2_fast.nn.attention import CrossAttention, SelfAttention, calm_padding
from mplug2_fast.nn.layer_norm import norm_of_sum
from mplug2_fast.nn.mlp import MLP
from mplug2_fast.nn.parts import dropout_rate
from mplug2_fast.nn.unchanged import Kinds, unchanged

Step = Callable[[Tensor | None], Tensor]
"""Takes the residual to add to its result: the step's input, or None to add nothing."""

_ADDING: Kinds = frozenset((SelfAttention, CrossAttention, MLP))
"""Modules that can add the residual themselves."""


def add_norm(norm: nn.Module, dropout: nn.Module, x: Tensor, step: Step, *, fused: bool = True) -> Tensor:
    """norm(x + dropout(step)). The step adds x itself where nothing is dropped out, unless `fused` is false."""
    rate = dropout_rate(dropout)
    if rate == 0 and fused:
        return norm(step(x))
    update = step(None)
    return norm_of_sum(norm, x, update if rate == 0 else dropout(update))


class PostNormLayer(nn.Module):
    """Self-attention, cross-attention where there is a memory, FFN; after each the residual and a layer norm.

    A subclass has these modules:

        dropout: on what each step adds. attention_norm, cross_norm, mlp_norm: the norm after each step.
        attention: called and projecting like `SelfAttention`.
        cross: called, projecting and attending like `CrossAttention`; None, as `cross_norm`, where there is none.
        mlp: called like `MLP`.
    """

    dropout: nn.Module
    attention: nn.Module
    attention_norm: nn.Module
    cross: nn.Module | None
    cross_norm: nn.Module | None
    mlp: nn.Module
    mlp_norm: nn.Module

    def attend_self(self, x: Tensor, *, key_padding_mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """The self-attention step of x `(..., tokens, hidden)`."""
        x = calm_padding(x, key_padding_mask)

        def step(residual: Tensor | None) -> Tensor:
            return self.attention(x, key_padding_mask=key_padding_mask, causal=causal, **_adding(residual))

        return add_norm(self.attention_norm, self.dropout, x, step, fused=unchanged(_ADDING, self.attention))

    def attend_cross(
        self, x: Tensor, memory: Tensor, *, key_padding_mask: Tensor | None = None, query: Tensor | None = None
    ) -> Tensor:
        """The cross-attention step of x `(..., tokens, hidden)` to memory `(..., keys, hidden)`; `query` is
        `cross.project_query(x)` where that is known already."""
        if self.cross is None:
            raise ValueError("there is a memory, and this layer was built without cross-attention")

        def step(residual: Tensor | None) -> Tensor:
            given = {"key_padding_mask": key_padding_mask, **_adding(residual)}
            return self.cross(x, memory, **given) if query is None else self.cross.attend(query, memory, **given)

        return add_norm(self.cross_norm, self.dropout, x, step, fused=unchanged(_ADDING, self.cross))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The FFN step of x `(..., hidden)`."""

        def step(residual: Tensor | None) -> Tensor:
            return self.mlp(x) if residual is None else self.mlp(x, residual=True)

        return add_norm(self.mlp_norm, self.dropout, x, step, fused=unchanged(_ADDING, self.mlp))

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


def _adding(residual: Tensor | None) -> dict[str, Tensor]:
    """The argument for a module that adds the residual itself. Others may not know it."""
    return {} if residual is None else {"residual": residual}
