"""BERT embeddings and layers, post-norm, batch-first, with fused projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2_fast.nn import MLP, CrossAttention, LayerNorm, SelfAttention
from mplug2_fast.nn.config import BertConfig
from mplug2_fast.nn.parts import PLAIN, plain
from mplug2_fast.nn.post_norm import PostNormLayer
from mplug2_fast.nn.unchanged import Kinds


def _embedding(rows: int, dim: int) -> nn.Embedding:
    """An uninitialised table: `nn.Embedding`'s own start imports the compiler when it is on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word = _embedding(config.vocab_size, config.hidden_size)
        self.position = _embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = _embedding(config.type_vocab_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """input_ids `(..., tokens)`, at positions from `start` on, to `(..., tokens, hidden)`."""
        return self.dropout(self.norm(self.sums(input_ids, start)))

    def sums(self, input_ids: Tensor, start: int) -> Tensor:
        """As `forward`, before the norm."""
        end = start + input_ids.shape[-1]
        if plain(self.position, self.token_type):
            return self.word(input_ids) + (self.position.weight[start:end] + self.token_type.weight[0])
        positions = torch.arange(start, end, device=input_ids.device)
        return self.word(input_ids) + (self.position(positions) + self.token_type(torch.zeros_like(input_ids)))


class BertLayer(PostNormLayer):
    """A BERT layer whose projections are fused: queries, keys and values in one product, or keys and values in one."""

    def __init__(self, config: BertConfig, *, cross_attention: bool) -> None:
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


BERT_KINDS: Kinds = PLAIN | {BertEmbeddings, BertLayer, SelfAttention, CrossAttention, MLP}
"""The classes of all modules in a text encoder."""
