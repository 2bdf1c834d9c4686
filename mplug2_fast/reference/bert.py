"""BERT layers as mPLUG-2 uses them: eager attention with explicit scores and additive masks, post-norm.

Hidden states are `(batch, tokens, channels)`. Masks are additive, `(batch, 1, 1 or queries, keys)`. Parameters have the
names and layouts of the fast layers, in which the weights of queries, keys and values are one tensor.
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


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * size, size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * size))
        self.out_proj = nn.Linear(size, size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(states, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states, weight, bias in zip((x, memory, memory), weights, biases, strict=True)
        )
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores + mask
        context = torch.matmul(self.dropout(scores.softmax(dim=-1)), value)
        return self.out_proj(context.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(size, inner)
        self.c_proj = nn.Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class BertLayer(nn.Module):
    """Self-attention, cross-attention where there is a memory, MLP. Each is followed by dropout, residual and norm."""

    def __init__(self, config: BertConfig, *, cross_attention: bool) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.attention = BertAttention(config)
        self.attention_norm = nn.LayerNorm(size, eps=eps)
        if cross_attention:
            self.cross = BertAttention(config)
            self.cross_norm = nn.LayerNorm(size, eps=eps)
        self.mlp = MLP(size, config.intermediate_size)
        self.mlp_norm = nn.LayerNorm(size, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        x = self.attention_norm(self.dropout(self.attention(x, x, mask)) + x)
        if memory is not None:
            x = self.cross_norm(self.dropout(self.cross(x, memory, memory_mask)) + x)
        return self.mlp_norm(self.dropout(self.mlp(x)) + x)


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
