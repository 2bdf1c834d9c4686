"""Attention of whole sequences, and of single beam tokens against a memory that a video's beams share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(query·keyᵀ / √head_dim)·value, self or cross.

    Args:
        query: `(batch, q_len, heads, head_dim)`. key, value: `(batch, k_len, heads, head_dim)`. Any strides.
        key_padding_mask: `(batch, k_len)`, nonzero for tokens, zero for padding.
        causal: query i sees keys up to i; q_len must equal k_len.

    Returns `(batch, q_len, heads·head_dim)`.
    """
    mask = None
    if key_padding_mask is not None:
        mask = key_padding_mask[:, None, None, :].bool()
        if causal:
            length = query.shape[1]
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=causal and mask is None,
    )
    return out.transpose(1, 2).flatten(2)


def beam_attention(query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
    """Attention of the queries of a video's beams to the one memory that they share.

    Args:
        query: `(batch, queries, heads, head_dim)`, the queries of all beams of a video side by side.
        key, value: `(batch, heads, k_len, head_dim)`. key_padding_mask: `(batch, k_len)`, zero for padding.

    Returns `(batch, queries, heads·head_dim)`.
    """
    query = query.transpose(1, 2)
    mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :].bool()
    if query.device.type == "cpu" and query.shape[2] <= 16:
        # A handful of queries: two products that read the memory once beat the blocked kernel three times over.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        out = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value
    else:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)
