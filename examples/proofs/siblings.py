"""Tasks for frames with labels such as "a red circle", whose losses compare labels that differ in one word alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.datasets import Item
from mplug2_fast.nn.contrast import contrast_within
from mplug2_fast.tasks import Classification, ZeroShot
from mplug2_fast.text import Tokenizer

NEVER = -1e4
"""The logit of what is not compared."""


class Look(Classification):
    """The color or the shape of a frame, among those of the frames with the same shape or color in the batch.

    Among all, it would learn which pairs are not trained, and that a red frame is no circle.
    """

    def __init__(self, labels: Sequence[str], name: str, word: int) -> None:
        super().__init__(labels, name=name)
        self._word = word

    def label_of(self, item: Item) -> int:
        return self.labels.index(str(item.label).split()[self._word])

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        return {**super().batch(items, tokenizer, config), "same": _same(items, 3 - self._word)}

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        labels = F.one_hot(batch["labels"], len(self.labels)).bool()
        possible = (batch["same"][:, :, None] & labels).any(dim=1)
        return F.cross_entropy(self.logits(model, batch).masked_fill(~possible, NEVER), batch["labels"])


class Siblings(ZeroShot):
    """The caption of a frame, among those in the batch with the same color, and among those with the same shape."""

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        ids, mask = config.wording.descriptions(tokenizer, [str(i.label) for i in items], video=False, training=True)
        same = torch.stack([_same(items, word) for word in (1, 2)])
        return {"text_ids": ids, "text_mask": mask, "same": same}

    def targets(self, batch: Mapping[str, Tensor], config: Any) -> int:
        return len(batch["text_ids"])

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        visual = model.visual_features(model.embed(batch.get("video"), batch.get("image_embeds")))
        text = model.text_features(model.encode_text(batch["text_ids"], batch["text_mask"]))
        logits = visual @ text.T / model.contrast.temperature
        numbers = batch["same"].all(dim=0).int().argmax(dim=1)  # the first frame with the same caption
        return sum(contrast_within(logits.masked_fill(~same, NEVER), numbers) for same in batch["same"]) / 2


def _same(items: Sequence[Item], word: int) -> Tensor:
    """Which labels have the same word in a place: `(items, items)`."""
    words = np.array([str(item.label).split()[word] for item in items])
    return torch.from_numpy(words[:, None] == words)
