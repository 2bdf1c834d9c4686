"""The head that predicts words, with the weights of the word embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2_fast.nn.config import BertConfig
from mplug2_fast.nn.layer_norm import LayerNorm
from mplug2_fast.nn.parts import linear
from mplug2_fast.ops.linear_act import linear_act


class WordHead(nn.Module):
    """BERT's head for masked words: a layer, a norm, and the product with the word embeddings, which others own.

    Source: BERT (arXiv 1810.04805), appendix A.1.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Hidden states `(..., hidden)` and word embeddings `(vocabulary, hidden)` to logits `(..., vocabulary)`."""
        return linear_act(self.norm(linear(self.dense, x, "gelu")), words, self.bias)
