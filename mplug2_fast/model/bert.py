"""BERT embeddings and layers, post-norm, batch-first, with fused projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mplug2_fast.config import TextConfig
from mplug2_fast.nn import MLP, CrossAttention, LayerNorm, SelfAttention


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

    def forward(self, input_ids: Tensor, start: int = 0) -> Tensor:
        """input_ids `(..., tokens)`, at positions from `start` on, to `(..., tokens, hidden)`."""
        constant = self.position.weight[start : start + input_ids.shape[-1]] + self.token_type.weight[0]
        return self.dropout(self.norm(self.word(input_ids) + constant))


class BertLayer(nn.Module):
    """Self-attention, cross-attention where there is a memory, FFN; each with residual and layer norm."""

    def __init__(self, config: TextConfig, *, cross_attention: bool) -> None:
        super().__init__()
        dim, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention = SelfAttention(dim, heads, config.attention_probs_dropout_prob)
        self.attention_norm = LayerNorm(dim, eps=eps)
        if cross_attention:
            self.cross = CrossAttention(dim, heads, config.attention_probs_dropout_prob)
            self.cross_norm = LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, config.intermediate_size, "gelu")
        self.mlp_norm = LayerNorm(dim, eps=eps)

    def add_norm(self, norm: LayerNorm, x: Tensor, sublayer: Callable[[Tensor | None], Tensor]) -> Tensor:
        """norm(x + sublayer). The sublayer takes the residual that it adds itself: x, or None where its result is
        dropped out first."""
        if self.training and self.dropout.p > 0:
            return norm.add(x, self.dropout(sublayer(None)))
        return norm(sublayer(x))

    def attend_self(self, x: Tensor, *, key_padding_mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """The self-attention sub-layer."""
        return self.add_norm(
            self.attention_norm,
            x,
            lambda residual: self.attention(x, key_padding_mask=key_padding_mask, causal=causal, residual=residual),
        )

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.add_norm(self.mlp_norm, x, lambda residual: self.mlp(x, residual=residual is not None))

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """x `(batch, tokens, hidden)`; masks `(batch, keys)`, nonzero for tokens."""
        x = self.attend_self(x, key_padding_mask=key_padding_mask, causal=causal)
        if memory is not None:
            query = self.cross.project_query(x)
            x = self.add_norm(
                self.cross_norm,
                x,
                lambda residual: self.cross.attend(query, memory, key_padding_mask=memory_mask, residual=residual),
            )
        return self.feed_forward(x)
