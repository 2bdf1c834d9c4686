"""Multi-head attention with the parameters of `torch.nn.MultiheadAttention`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2_fast.nn.parts import add_linear, dropout_rate
from mplug2_fast.ops.attention import attention_reference, attention_with_dropout, check
from mplug2_fast.ops.linear_act import linear_act
from mplug2_fast.ops.runtime.dispatch import autocast_dtype


class MultiHeadAttention(nn.Module):
    """What all attention modules share: heads, dropout on the attention weights, and the product after them.

    A subclass has `out_proj`, a linear layer, and projects.
    """

    out_proj: nn.Module

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)

    def split_heads(self, x: Tensor) -> Tensor:
        """`(..., embed_dim)` to `(..., num_heads, head_dim)`."""
        return x.unflatten(-1, (self.num_heads, -1))

    def project_out(self, context: Tensor, residual: Tensor | None = None) -> Tensor:
        """The output projection of context `(..., embed_dim)`, plus the residual of the same shape."""
        return add_linear(self.out_proj, context, residual)

    def attend_heads(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Attention of projected heads, and the output projection, plus the residual `(..., q_len, embed_dim)`; the
        other arguments as for `context_of_heads`.

        Returns `(..., q_len, embed_dim)`.
        """
        context = self.context_of_heads(query, key, value, key_padding_mask=key_padding_mask, causal=causal)
        return self.project_out(context, residual)

    def context_of_heads(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attention of projected heads.

        Args:
            query: `(..., q_len, num_heads, head_dim)`. key, value: `(..., k_len, num_heads, head_dim)`.
            key_padding_mask: `(..., k_len)`. The leading axes are the same.

        Returns `(..., q_len, embed_dim)`.

        Raises:
            ValueError: shapes that do not go together.
        """
        if query.shape[:-3] != key.shape[:-3]:
            raise ValueError(
                f"queries and keys must have the same leading axes, got {tuple(query.shape[:-3])} and "
                f"{tuple(key.shape[:-3])}"
            )
        if key_padding_mask is not None and key_padding_mask.shape != key.shape[:-2]:
            raise ValueError(f"key_padding_mask must be {tuple(key.shape[:-2])}, got {tuple(key_padding_mask.shape)}")
        context = attend(
            self.dropout,
            _as_batch(query, 3),
            _as_batch(key, 3),
            _as_batch(value, 3),
            key_padding_mask=None if key_padding_mask is None else _as_batch(key_padding_mask, 1),
            causal=causal,
        )
        return context.view(*query.shape[:-2], self.embed_dim)


def attend(
    dropout: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """`mplug2_fast.ops.attention` with a dropout on its weights. One that is not plain is called with all weights."""
    rate = dropout_rate(dropout)
    if rate is None:
        check(query, key, value, key_padding_mask, causal)
        return attention_reference(query, key, value, key_padding_mask, causal, dropout=dropout)
    return attention_with_dropout(query, key, value, rate, key_padding_mask=key_padding_mask, causal=causal)


def _as_batch(x: Tensor, axes: int) -> Tensor:
    """x with one axis before its last `axes` axes, whatever stood there."""
    leading = x.dim() - axes
    if leading == 1:
        return x
    return x[None] if leading == 0 else x.flatten(0, leading - 1)


def calm_padding(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """x `(..., tokens, channels)`, where gradients may be asked for with zeros for numbers of the padding that would
    overflow: gradients of weights, norms and keys multiply them by zero, which gives NaN."""
    if key_padding_mask is None or key_padding_mask.shape != x.shape[:-1] or not torch.is_grad_enabled():
        return x
    limit = torch.finfo(autocast_dtype(x) or x.dtype).max ** 0.75
    return x.masked_fill(~(key_padding_mask[..., None].bool() | (x.abs() < limit)), 0)


class _FusedAttention(MultiHeadAttention):
    """The parameters of `torch.nn.MultiheadAttention`: `in_proj_weight` has those of queries, keys and values, in this
    order, `embed_dim` rows each."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__(embed_dim, num_heads, dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj.reset_parameters()
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)


class SelfAttention(_FusedAttention):
    """Self-attention within the last but one axis; queries, keys and values come from one product.

    Replaces `torch.nn.MultiheadAttention` called with one tensor: the same state dict.

    Args:
        embed_dim: channels. num_heads: heads; must divide embed_dim. dropout: on the attention weights, when training.
        bias: whether both projections have one.

    Raises:
        ValueError: num_heads does not divide embed_dim.
    """

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `(..., embed_dim)` to queries, keys and values, each a `(..., num_heads, head_dim)` view."""
        qkv = linear_act(x, self.in_proj_weight, self.in_proj_bias)
        return qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x and result `(..., tokens, embed_dim)`, any leading axes or none; key_padding_mask `(..., tokens)`, nonzero
        for tokens; causal lets a token see itself and those before it; residual, of x's shape, is added to the
        result."""
        qkv = self.project(calm_padding(x, key_padding_mask))
        return self.attend_heads(*qkv, key_padding_mask=key_padding_mask, causal=causal, residual=residual)


class CrossAttention(_FusedAttention):
    """Attention of one sequence to another; the memory's keys and values come from one product.

    Replaces `torch.nn.MultiheadAttention` called with a query and a memory: the same state dict.

    Args:
        embed_dim: channels of both. num_heads: heads; must divide embed_dim. dropout: on the attention weights, when
            training. bias: whether the projections have one.

    Raises:
        ValueError: num_heads does not divide embed_dim.
    """

    def project_query(self, x: Tensor) -> Tensor:
        """x `(..., embed_dim)` to `(..., num_heads, head_dim)`."""
        return self.split_heads(linear_act(x, *self.query_parameters()))

    def query_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the queries' projection."""
        dim, bias = self.embed_dim, self.in_proj_bias
        return self.in_proj_weight[:dim], None if bias is None else bias[:dim]

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory `(..., embed_dim)` to keys and values, each a `(..., num_heads, head_dim)` view."""
        dim, bias = self.embed_dim, self.in_proj_bias
        kv = linear_act(memory, self.in_proj_weight[dim:], None if bias is None else bias[dim:])
        return kv.unflatten(-1, (2, self.num_heads, -1)).unbind(-3)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x and result `(..., q_len, embed_dim)`; memory `(..., k_len, embed_dim)`, with the same leading axes, any or
        none; key_padding_mask `(..., k_len)`, nonzero for tokens; residual, of x's shape, is added to the result."""
        return self.attend(self.project_query(x), memory, key_padding_mask=key_padding_mask, residual=residual)

    def attend(
        self,
        query: Tensor,
        memory: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`forward` with the result of `project_query` in place of x."""
        key, value = self.project_memory(calm_padding(memory, key_padding_mask))
        return self.attend_heads(query, key, value, key_padding_mask=key_padding_mask, residual=residual)
