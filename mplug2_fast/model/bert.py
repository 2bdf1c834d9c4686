"""BERT embeddings and layers, post-norm, batch-first, with fused projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2_fast.config import TextConfig
from mplug2_fast.nn import MLP, CrossAttention, LayerNorm, SelfAttention
from mplug2_fast.nn.post_norm import PostNormLayer


def _embedding(rows: int, dim: int) -> nn.Embedding:
    """An uninitialised table: `nn.Embedding`'s own start imports the compiler when it is on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)


class BertEmbeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word = _embedding(config.vocab_size, config.hidden_size)
        self.position = _embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = _embedding(config.type_vocab_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids `(..., tokens)`, at positions from 0 on, to `(..., tokens, hidden)`."""
        constant = self.position.weight[: input_ids.shape[-1]] + self.token_type.weight[0]
        return self.dropout(self.norm(self.word(input_ids) + constant))

    def sums(self, input_ids: Tensor, start: int) -> Tensor:
        """input_ids of any shape, all at position `start`, to `(..., hidden)`, before the norm."""
        return self.word(input_ids) + (self.position.weight[start] + self.token_type.weight[0])


class BertLayer(PostNormLayer):
    """A BERT layer whose projections are fused: queries, keys and values in one product, or keys and values in one."""

    def __init__(self, config: TextConfig, *, cross_attention: bool) -> None:
        super().__init__()
        dim, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention = SelfAttention(dim, heads, config.attention_probs_dropout_prob)
        self.attention_norm = LayerNorm(dim, eps=eps)
        self.cross = self.cross_norm = None
        if cross_attention:
            self.cross = CrossAttention(dim, heads, config.attention_probs_dropout_prob)
            self.cross_norm = LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, config.intermediate_size, "gelu")
        self.mlp_norm = LayerNorm(dim, eps=eps)
