"""Multi-head attention with the parameters of `torch.nn.MultiheadAttention`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2_fast.nn.parts import add_linear, dropout_rate
from mplug2_fast.ops.attention import attention_reference, attention_with_dropout, check_attention
from mplug2_fast.ops.decoder_layer import WeightAndBias, WithScale
from mplug2_fast.ops.linear_act import linear_act
from mplug2_fast.ops.runtime.autocast import autocast_dtype


class AttentionHeads(nn.Module):
    """Attention of projected heads, with dropout on its weights. Subclasses add the projections."""

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

    def context(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attention without the output projection.

        Args:
            query: `(..., q_len, num_heads, head_dim)`.
            key, value: `(..., k_len, num_heads, head_dim)`, with the leading axes of query.
            key_padding_mask: `(..., k_len)`, nonzero for tokens.

        Returns `(..., q_len, embed_dim)`.

        Raises:
            ValueError: the shapes do not match.
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
    """`mplug2_fast.ops.attention` with dropout on its weights. A dropout module that must be called gets the full
    weight matrix."""
    rate = dropout_rate(dropout)
    if rate is None:
        check_attention(query, key, value, key_padding_mask, causal)
        return attention_reference(query, key, value, key_padding_mask, causal, dropout=dropout)
    return attention_with_dropout(query, key, value, rate, key_padding_mask=key_padding_mask, causal=causal)


def _as_batch(x: Tensor, axes: int) -> Tensor:
    """x with all axes before its last `axes` axes flattened into one."""
    leading = x.dim() - axes
    if leading == 1:
        return x
    return x[None] if leading == 0 else x.flatten(0, leading - 1)


def calm_padding(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """x `(..., tokens, channels)`, with padding values that could overflow set to zero while gradients are enabled.

    Gradients of weights, norms and keys multiply padding by zero, and zero times infinity is NaN.
    """
    if key_padding_mask is None or key_padding_mask.shape != x.shape[:-1] or not torch.is_grad_enabled():
        return x
    limit = torch.finfo(autocast_dtype(x) or x.dtype).max ** 0.75
    return x.masked_fill(~(key_padding_mask[..., None].bool() | (x.abs() < limit)), 0)


def in_product(
    module: nn.Module,
    x: Tensor,
    rows: slice | None = None,
    *,
    norm: nn.Module | None = None,
    many: bool = False,
) -> Tensor:
    """The product of x `(..., embed_dim)` with `in_proj_weight` or some rows of it, or with the layer `in_proj` of
    8-bit weights in its place.

    Args:
        norm: a layer norm that x goes through first. many: x is a memory of many tokens, which 8 bits suffice for.
    """
    quantised = module._modules.get("in_proj")
    if quantised is not None:
        return quantised(x, norm=norm, rows=rows, many=many)
    x = x if norm is None else norm(x)
    weight, bias = module.in_proj_weight, module.in_proj_bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return linear_act(x, weight, bias)


class FusedProjections(AttentionHeads):
    """Heads with one weight for queries, keys and values, as in `torch.nn.MultiheadAttention`.

    `in_proj_weight` and `in_proj_bias` hold those of queries, keys and values, in this order, `embed_dim` rows each.
    The projections use only attributes that `torch.nn.MultiheadAttention` has too. A layer `in_proj` with 8-bit weights
    may be in place of all of them, or a layer `memory_proj` in place of those of keys and values.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__(embed_dim, num_heads, dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim)) if bias else None
        FusedProjections.reset_parameters(self)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)

    def project(self, x: Tensor, norm: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x `(..., embed_dim)`, after the norm, to queries, keys and values, each a `(..., num_heads, head_dim)`
        view."""
        qkv = in_product(self, x, norm=norm)
        return qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)

    def project_query(self, x: Tensor) -> Tensor:
        """x `(..., embed_dim)` to `(..., num_heads, head_dim)`."""
        return in_product(self, x, slice(None, self.embed_dim)).unflatten(-1, (self.num_heads, -1))

    def projection(self) -> WeightAndBias | WithScale:
        """Weight and bias of the projections, and the scale of an 8-bit weight."""
        quantised = self._modules.get("in_proj")
        return (self.in_proj_weight, self.in_proj_bias) if quantised is None else quantised.parts()

    def query_projection(self) -> WeightAndBias | WithScale:
        """Those of the query's projection."""
        return tuple(None if part is None else part[: self.embed_dim] for part in self.projection())

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory `(..., embed_dim)` to keys and values, each a `(..., num_heads, head_dim)` view."""
        quantised = self._modules.get("memory_proj")
        if quantised is not None:
            kv = quantised(memory, many=True)
        else:
            kv = in_product(self, memory, slice(self.embed_dim, None), many=True)
        return kv.unflatten(-1, (2, self.num_heads, -1)).unbind(-3)


class _TorchAttention(FusedProjections):
    """The parameters of `torch.nn.MultiheadAttention`."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.out_proj.reset_parameters()
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)


class SelfAttention(_TorchAttention):
    """Self-attention over the second to last axis. One product computes queries, keys and values.

    Replaces `torch.nn.MultiheadAttention` called with one tensor. The state dict is the same.

    Args:
        embed_dim: channels.
        num_heads: heads; must divide embed_dim.
        dropout: on the attention weights, in training.
        bias: whether both projections have one.

    Raises:
        ValueError: num_heads does not divide embed_dim.
    """

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        norm: nn.Module | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Attends within x.

        Args:
            x: `(..., tokens, embed_dim)`, with any leading axes.
            key_padding_mask: `(..., tokens)`, nonzero for tokens.
            causal: each token sees only itself and earlier ones.
            norm: a layer norm that x goes through first.
            residual: added to the result; has the shape of x.

        Returns a tensor of x's shape.
        """
        if norm is not None and key_padding_mask is not None:
            x, norm = norm(x), None
        heads = self.project(calm_padding(x, key_padding_mask), norm)
        context = self.context(*heads, key_padding_mask=key_padding_mask, causal=causal)
        return add_linear(self.out_proj, context, residual)


class CrossAttention(_TorchAttention):
    """Attention of one sequence to another. One product computes the keys and values of the memory.

    Replaces `torch.nn.MultiheadAttention` called with a query and a memory. The state dict is the same.

    Args:
        embed_dim: channels of both sequences.
        num_heads: heads; must divide embed_dim.
        dropout: on the attention weights, in training.
        bias: whether the projections have one.

    Raises:
        ValueError: num_heads does not divide embed_dim.
    """

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Attends from x to memory.

        Args:
            x: `(..., q_len, embed_dim)`, with any leading axes.
            memory: `(..., k_len, embed_dim)`, with the same leading axes.
            key_padding_mask: `(..., k_len)`, nonzero for tokens.
            residual: added to the result; has the shape of x.

        Returns a tensor of x's shape.
        """
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
        context = self.context(query, key, value, key_padding_mask=key_padding_mask)
        return add_linear(self.out_proj, context, residual)
