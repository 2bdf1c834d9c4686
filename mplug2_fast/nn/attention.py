"""Multi-head attention with fused input projections."""

from __future__ import annotations

from torch import Tensor, nn

from mplug2_fast.ops.attention import attention_with_dropout
from mplug2_fast.ops.linear_act import linear_act


class SelfAttention(nn.Module):
    """Self-attention within the last but one axis; queries, keys and values come from one product.

    Args:
        dim: channels. num_heads: heads; must divide dim. dropout: on the attention weights, when training.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `(batch, tokens, dim)` to queries, keys and values, each a `(batch, tokens, heads, head_dim)` view."""
        qkv = linear_act(x, self.qkv.weight, self.qkv.bias)
        return qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x `(..., tokens, dim)`, any leading axes; key_padding_mask `(batch, tokens)`, nonzero for tokens; residual,
        of x's shape, is added to the result."""
        query, key, value = self.project(x.flatten(0, -3))
        dropout = self.dropout.p if self.training else 0.0
        context = attention_with_dropout(
            query, key, value, dropout, key_padding_mask=key_padding_mask, causal=causal
        ).view(x.shape)
        return linear_act(context, self.out.weight, self.out.bias, residual=residual)


class CrossAttention(nn.Module):
    """Attention of one sequence to another; the memory's keys and values come from one product.

    Args:
        dim: channels of both. num_heads: heads; must divide dim. dropout: on the attention weights, when training.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        self.query = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def project_query(self, x: Tensor) -> Tensor:
        """x `(batch, tokens, dim)` to `(batch, tokens, heads, head_dim)`."""
        return linear_act(x, self.query.weight, self.query.bias).unflatten(-1, (self.num_heads, -1))

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory `(batch, tokens, dim)` to keys and values, each a `(batch, tokens, heads, head_dim)` view."""
        kv = linear_act(memory, self.kv.weight, self.kv.bias)
        return kv.unflatten(-1, (2, self.num_heads, -1)).unbind(-3)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x `(batch, q_len, dim)`; memory `(batch, k_len, dim)`; key_padding_mask `(batch, k_len)`, 1 for tokens;
        residual, of x's shape, is added to the result."""
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
        key, value = self.project_memory(memory)
        dropout = self.dropout.p if self.training else 0.0
        context = attention_with_dropout(query, key, value, dropout, key_padding_mask=key_padding_mask)
        return linear_act(context, self.out.weight, self.out.bias, residual=residual)
