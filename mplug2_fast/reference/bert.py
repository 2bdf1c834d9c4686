"""BERT layers as mPLUG-2 uses them: eager attention with explicit scores and additive masks, post-norm.

Hidden states are `(batch, tokens, channels)`. Masks are additive, `(batch, 1, 1 or queries, keys)`. Parameters have the
names of the fast layers, in which the weights of queries, keys and values are one tensor.
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
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.word(input_ids) + self.token_type(torch.zeros_like(input_ids))
        return self.dropout(self.norm(x + self.position(positions)))


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query, self.key, self.value = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.query(x), self.key(memory), self.value(memory))
        )
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores + mask
        context = torch.matmul(self.dropout(scores.softmax(dim=-1)), value)
        return context.transpose(1, 2).flatten(2)


class BertOutput(nn.Module):
    """Projection, dropout, residual, layer norm: the end of an attention (inner = hidden) and of an MLP."""

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
    """Self-attention, cross-attention where there is a memory, MLP."""

    def __init__(self, config: BertConfig, *, cross_attention: bool) -> None:
        super().__init__()
        self.attention = BertAttention(config)
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
        x = self.attention(x, x, mask)
        if memory is not None:
            x = self.crossattention(x, memory, memory_mask)
        return self.output(self.intermediate(x), x)


class TextDecoder(nn.Module):
    """Causal layers with cross-attention, and a language-model head that shares the word embeddings."""

    def __init__(self, config: BertConfig, num_layers: int) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList([BertLayer(config, cross_attention=True) for _ in range(num_layers)])
        self.head = nn.Linear(config.hidden_size, config.hidden_size)
        self.head_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, memory: Tensor, memory_mask: Tensor | None) -> Tensor:
        """Logits `(batch, tokens, vocabulary)` of whole sequences."""
        x = self.embeddings(input_ids)
        mask = self_attention_mask(attention_mask, x.dtype, causal=True)
        if memory_mask is not None:
            memory_mask = cross_attention_mask(memory_mask, x.dtype)
        for layer in self.layers:
            x = layer(x, mask, memory, memory_mask)
        return F.linear(self.head_norm(F.gelu(self.head(x))), self.embeddings.word.weight, self.head_bias)
