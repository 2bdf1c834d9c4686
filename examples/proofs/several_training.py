"""The losses of training with several phrases about each picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.datasets import Item
from mplug2_fast.nn.parts import linear
from mplug2_fast.tasks.grounding import BINS, FIRST_BIN, START, Grounding
from mplug2_fast.text import Tokenizer


class Boxes(Grounding):
    """Grounding of several phrases in each picture, which is encoded once.

    Attributes:
        steps: multiples of 1 / steps are the bins that are used.
    """

    steps = 64

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        pairs = [each for item in items for each in zip(item.caption, item.extra["boxes"], strict=True)]
        batch = super().batch([Item(id="", text=text, box=box) for text, box in pairs], tokenizer, config)
        longest = int(batch["text_mask"].sum(dim=1).max())
        return {**batch, **{key: batch[key][:, :longest] for key in ("text_ids", "text_mask")}}

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:  # type: ignore[override]
        visual, mask = model.encode_video(batch["video"]), batch["text_mask"]
        text = model.encode_text(batch["text_ids"], mask)
        fused = model.fuse(*(each.unflatten(0, (len(visual), -1)) for each in (text, mask)), visual)
        memory = model.decoder.remember(fused.memory.flatten(0, 1), fused.memory_mask.flatten(0, 1))
        return soft_box_loss(model, memory, batch["target_boxes"], self.steps)


class Phrases(Boxes):
    """The same with further losses.

    They teach the first token of a phrase to find the named shape, and the last word to find the shape that it
    describes: by the features of the fused words and of patches, and by the cross-attention of the fusion encoder. The
    last word must find its shape in the first layer, so that the last layer can use the place. For every second phrase
    the decoder sees the fused words alone, so these must bring the place of the named shape.
    """

    modules = Grounding.modules | {"contrast"}
    steps = 32

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        last_boxes = torch.tensor([box for item in items for box in item.extra["last"]])
        return {**super().batch(items, tokenizer, config), "last_boxes": last_boxes}

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:  # type: ignore[override]
        visual, mask = model.encode_video(batch["video"]), batch["text_mask"]
        rows = torch.arange(len(mask))
        start, end = (rows, torch.zeros_like(rows)), (rows, mask.sum(dim=1) - 2)
        named, last = (patches_of(model, batch[name]) for name in ("target_boxes", "last_boxes"))
        text = model.encode_text(batch["text_ids"], mask)
        text, mask = (each.unflatten(0, (len(visual), -1)) for each in (text, mask))
        *before, final = model.fusion.layers
        attended = attention_loss(before[0], text, mask, visual, end, last)
        for layer in before:
            text = layer(text, key_padding_mask=mask, memory=visual)
        attended = attended + attention_loss(final, text, mask, visual, start, named)
        text = final(text, key_padding_mask=mask, memory=visual)
        words = text.flatten(0, 1)
        found = contrast_loss(model, words[start], visual, named) + contrast_loss(model, words[end], visual, last)
        seen = visual[:, None].expand(-1, text.shape[1], -1, -1)
        visible = mask.new_ones(seen.shape[:-1])
        visible[:, 1::2] = 0
        both_mask = torch.cat([visible, mask], dim=-1)
        memory = model.decoder.remember(torch.cat([seen, text], dim=-2).flatten(0, 1), both_mask.flatten(0, 1))
        return soft_box_loss(model, memory, batch["target_boxes"], self.steps) + attended + found / 2


def soft_box_loss(model: Any, memory: Any, boxes: Tensor, steps: int) -> Tensor:
    """The mean cross-entropy of the four coordinates. A coordinate between two bins is shared by both.

    Args:
        memory: the decoder's. boxes: (center x, center y, width, height) of each `(n, 4)`.
        steps: bins are multiples of 1 / steps.
    """
    places = boxes.clamp(0, 1) * steps
    below, nearest = places.floor().clamp(max=steps - 1), bins_of(places.round(), steps)
    inputs = torch.cat([nearest.new_full((len(boxes), 1), START), nearest[:, :-1] + FIRST_BIN], dim=1)
    logits = model.decoder(inputs[:, None], torch.ones_like(inputs)[:, None], memory)[:, 0]
    logs = logits[..., FIRST_BIN : FIRST_BIN + BINS].log_softmax(dim=-1)
    found = torch.stack([bins_of(each, steps) for each in (below, below + 1)], dim=-1)
    weights = torch.stack([below + 1 - places, places - below], dim=-1)
    return -(logs.gather(-1, found) * weights).sum(dim=-1).mean()


def bins_of(places: Tensor, steps: int) -> Tensor:
    """Bins of multiples of 1 / steps."""
    return (places * ((BINS - 1) / steps)).floor().long()


def patches_of(model: Any, boxes: Tensor) -> Tensor:
    """The patches that have the centers of boxes `(n, 4)`: their numbers `(n,)`."""
    side = model.config.vision.image_size // model.config.vision.patch_size
    column, row = (boxes[:, :2] * side).long().clamp(max=side - 1).unbind(dim=1)
    return row * side + column


def contrast_loss(model: Any, words: Tensor, visual: Tensor, patches: Tensor) -> Tensor:
    """The cross-entropy of a patch among those of its picture, by features.

    Args:
        words: `(pictures * texts, D)`. visual: `(pictures, 1 + patches, D)`. patches: `(pictures * texts,)`.
    """
    keys = F.normalize(linear(model.contrast.vision_proj, visual[:, 1:]), dim=-1)
    found = model.contrast.text(words).unflatten(0, (len(visual), -1)) @ keys.mT  # (pictures, texts, patches)
    return F.cross_entropy(found.flatten(0, 1) / model.contrast.temperature, patches)


def attention_loss(
    layer: Any, text: Tensor, mask: Tensor, visual: Tensor, tokens: tuple[Tensor, Tensor], patches: Tensor
) -> Tensor:
    """The cross-entropy of a patch by the cross-attention of a fusion layer, averaged over its heads.

    Args:
        text: `(pictures, texts, tokens, D)`, the input of the layer. mask: `(pictures, texts, tokens)`.
        visual: `(pictures, 1 + patches, D)`.
        tokens: rows and columns of the tokens that attend. patches: `(pictures * texts,)`.
    """
    attention = layer.crossattention.self
    query = attention.project_query(layer.attention(text, key_padding_mask=mask)).flatten(0, 1)[tokens]
    query, (keys, _) = query.unflatten(0, (len(visual), -1)), attention.project_memory(visual)
    scores = torch.einsum("pthd,pshd->ptsh", query, keys) / query.shape[-1] ** 0.5
    targets = 1 + patches[:, None].expand(-1, scores.shape[-1])  # after the class token
    return F.cross_entropy(scores.flatten(0, 1), targets)
