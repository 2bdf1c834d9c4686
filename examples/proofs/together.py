"""Classes of a pair of texts, by the product of their mean vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mplug2_fast.tasks import KINDS, Classification
from mplug2_fast.text import SEP_TOKEN_ID

PRODUCT = 0.05
"""Weight of each number of the product at the start."""


class Together(Classification):
    """Classes of a pair of texts, by the class token and by the product of the mean vectors of both texts."""

    kind = "together"

    def head(self, config: Any) -> nn.Module:
        return nn.Sequential(nn.Dropout(config.text.hidden_dropout_prob), nn.Linear(2 * config.text.hidden_size, 2))

    def logits(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        ids, mask = batch["text_ids"], batch["text_mask"]
        hidden = model.encode_text(ids, mask)
        second = (ids == SEP_TOKEN_ID).cumsum(dim=1).bool()
        means = []
        for part in (mask.bool() & ~second, mask.bool() & second):
            part = part[..., None].to(hidden.dtype)
            means.append((hidden * part).sum(dim=1) / part.sum(dim=1).clamp(min=1).sqrt())
        return model.heads[self.name](torch.cat([hidden[:, 0], means[0] * means[1]], dim=1))


KINDS[Together.kind] = Together
DEFINITION_PAIRS = Together(("false", "true"), on="text", name="definition_pairs")


def start(model: Any) -> None:
    """Makes keys equal to queries, so that equal words attend to each other, and scores pairs by their dot product."""
    parameters = model.official_parameters()
    for name, weight in parameters.items():
        if name.endswith(".self.key.weight"):
            weight.detach().copy_(parameters[name.replace(".key.", ".query.")])
    weight = model.heads[DEFINITION_PAIRS.name][1].weight.detach()
    width = weight.shape[1] // 2
    weight[0, width:], weight[1, width:] = -PRODUCT, PRODUCT
