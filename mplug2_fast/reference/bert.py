"""BERT layers as mPLUG-2 uses them: eager attention with explicit scores and additive masks, post-norm.

Hidden states are `(batch, tokens, channels)`; masks are additive, `(batch, 1, 1 or queries, keys)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.nn.config import BertConfig

SELF_ATTENTION_MASK = -10000.0


def self_attention_mask(key_padding_mask: Tensor, dtype: torch.dtype, *, causal: bool = False) -> Tensor:
    """`(batch, keys)` of ones for tokens to an additive mask `(batch, 1, 1 or keys, keys)`."""
    mask = key_padding_mask[:, None, None, :].to(dtype)
    if causal:
        length = key_padding_mask.shape[1]
        mask = mask * torch.ones(length, length, dtype=dtype, device=mask.device).tril()
    return (1.0 - mask) * SELF_ATTENTION_MASK


def cross_attention_mask(key_padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`(batch, keys)` of ones for tokens to an additive mask `(batch, 1, 1, keys)`, larger than for self-attention."""
    return (1.0 - key_padding_mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(torch.zeros_like(input_ids))
        x = x + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x))


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = self._heads(self.query(x)), self._heads(self.key(memory)), self._heads(self.value(memory))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores + mask
        context = torch.matmul(self.dropout(scores.softmax(dim=-1)), value)
        return context.permute(0, 2, 1, 3).contiguous().flatten(2)


class BertOutput(nn.Module):
    """Projection, dropout, residual, layer norm: the end of an attention (inner = hidden) and of an FFN."""

    def __init__(self, config: BertConfig, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        return self.output(self.self(x, memory, mask), x)


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig, *, cross_attention: bool, num_latents: int = 0) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        if num_latents:
            self.latents = nn.Parameter(torch.empty(num_latents, config.hidden_size))
        if cross_attention:
            self.crossattention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Self-attention, cross-attention where there is a memory, FFN."""
        x = self.attention(x, x, mask)
        if memory is not None:
            x = self.crossattention(x, memory, memory_mask)
        return self.output(self.intermediate(x), x)


class BertEncoder(nn.Module):
    """Layers under their index in the official file, so that layers without a use need not exist."""

    def __init__(self, layers: dict[int, BertLayer]) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({str(index): layer for index, layer in layers.items()})
