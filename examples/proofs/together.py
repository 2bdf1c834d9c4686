"""Classes of a pair of texts, by the class token and by the products of mean vectors of both texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.tasks import KINDS, Classification
from mplug2_fast.text import SEP_TOKEN_ID

PRODUCT = 0.05
"""Weight of each number of the product of hidden vectors at the start."""
SCALE = 5.0
"""Of word vectors. They then learn as with a learning rate that is larger by this factor."""


class Products(nn.Module):
    """Two classes by the class token, the product of the mean hidden vectors of both texts, and that of word vectors.

    Each text has its own table of word vectors. The weight of a word comes from its hidden vector.

    Args:
        words: size of the vocabulary. width: of hidden vectors and word vectors.
        dropout: of numbers. That of whole words is twice as large.
    """

    def __init__(self, words: int, width: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(words, width), nn.Embedding(words, width)
        self.counts = nn.Linear(width, 1)
        self.dropout, self.word_dropout = nn.Dropout(dropout), nn.Dropout(2 * dropout)
        self.classes = nn.Linear(3 * width, 2)

    def forward(self, ids: Tensor, hidden: Tensor, mask: Tensor, second: Tensor) -> Tensor:
        """Logits `(B, 2)`.

        Args:
            ids, mask, second: `(B, tokens)`; the mask, and whether a token belongs to the second text, are booleans.
            hidden: `(B, tokens, width)`.
        """
        counts = self.word_dropout(self.counts(hidden).exp())
        found = hidden.new_ones(2, *hidden[:, 0].shape)
        for part, table in ((mask & ~second, self.first), (mask & second, self.second)):
            part = part[..., None].to(hidden.dtype)
            length = part.sum(dim=1).clamp(min=1).sqrt()
            means = (hidden * part).sum(dim=1) / length, SCALE * (table(ids) * counts * part).sum(dim=1) / length
            found = found * torch.stack(means)
        return self.classes(torch.cat([self.dropout(hidden[:, 0]), self.dropout(found[0]), found[1]], dim=1))


class Together(Classification):
    """Classes of a pair of texts: see `Products`."""

    kind = "together"

    def head(self, config: Any) -> nn.Module:
        text = config.text
        return Products(text.vocab_size, text.hidden_size, text.hidden_dropout_prob)

    def logits(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        ids, mask = batch["text_ids"], batch["text_mask"]
        second = (ids == SEP_TOKEN_ID).cumsum(dim=1).bool()
        return model.heads[self.name](ids, model.encode_text(ids, mask), mask.bool(), second)


KINDS[Together.kind] = Together
DEFINITION_PAIRS = Together(("false", "true"), on="text", name="definition_pairs")


@torch.no_grad()
def start(model: Any) -> None:
    """Makes keys equal to queries, so that equal words attend to each other, and scores pairs by their dot products."""
    parameters = model.official_parameters()
    for name, weight in parameters.items():
        if name.endswith(".self.key.weight"):
            weight.copy_(parameters[name.replace(".key.", ".query.")])
    head = model.heads[DEFINITION_PAIRS.name]
    head.counts.weight.zero_()
    head.first.weight.normal_(std=0.02)
    head.second.weight.copy_(head.first.weight)
    width = head.first.weight.shape[1]
    for place, product in ((width, PRODUCT), (2 * width, 0.5)):
        head.classes.weight[0, place : place + width] = -product
        head.classes.weight[1, place : place + width] = product
