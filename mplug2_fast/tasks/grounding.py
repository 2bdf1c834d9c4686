"""Visual grounding: the box that a phrase names, as four tokens of the decoder (mPLUG, section 4.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.tasks.base import (
    BoxAlternative,
    Respond,
    Task,
    Texts,
    not_finite,
    require,
    require_positions,
    require_text,
    wide,
)

if TYPE_CHECKING:
    from mplug2_fast.datasets import Item
    from mplug2_fast.text import Tokenizer
    from mplug2_fast.video import Preparation

START, FIRST_BIN, BINS = 344, 345, 337
"""Ids of [unused339], which starts a box, and of [unused340], the first bin; number of bins from 0 to 1."""

MAX_ERROR = 5.0
MAX_PHRASE_LENGTH = 10_000
"""Characters."""

Weighting = Literal["official", "per_sample", "none"]


class Boxes(NamedTuple):
    """Predicted boxes.

    Attributes:
        boxes: (center x, center y, width, height) of each `(B, 4)`, in [0, 1].
        ids: tokens `(B, 4)`. logits: of the places `(B, 4, 337)`. scores: probability of the four tokens `(B,)`.
    """

    boxes: Tensor
    ids: Tensor
    logits: Tensor
    scores: Tensor


class Grounding(Task):
    """The box of the object that a phrase names in an image."""

    name = "grounding"
    modules = frozenset({"vision", "text", "fusion", "decoder"})
    reads_text = True
    fields = ("text", "box")
    metrics = ("boxes",)
    finds_boxes = True

    def loss(self, model: Any, batch: Mapping[str, Any], *, weighting: Weighting = "official") -> Tensor:
        """The mean cross-entropy of the four coordinates, weighted by how wrong the predicted box is.

        The weight of a coordinate is |predicted - true|, at most 5, times 1 - GIoU of the box, without a gradient. A
        coordinate that is hit exactly has the weight 0.

        Args:
            model: with the modules of this task.
            batch: `video` `(B, 3, 1, H, W)` or `image_embeds` `(B, S, D)`; `text_ids`, `text_mask` `(B, tokens)`;
                `target_boxes` `(B, 4)`, (center x, center y, width, height) in [0, 1].
            weighting: "per_sample": as above. "official": as the official code, which multiplies each sample's
                cross-entropy by the weights of all samples of the batch. "none": the plain cross-entropy.

        Raises:
            ValueError: no such weighting.
        """
        if weighting not in ("official", "per_sample", "none"):
            raise ValueError(f"weighting must be official, per_sample or none, got {weighting!r}")
        targets = wide(batch["target_boxes"])
        bins = (targets.clamp(0, 1) * (BINS - 1)).floor().long()
        inputs = torch.cat([bins.new_full((len(bins), 1), START), bins[:, :-1] + FIRST_BIN], dim=1)
        memory = _remember(model, batch)
        logits = model.decoder(inputs[:, None], torch.ones_like(inputs)[:, None], memory)[:, 0]
        logits = wide(_places(logits))
        losses = F.cross_entropy(logits.flatten(0, 1), bins.flatten(), reduction="none").view(bins.shape)
        if weighting == "none":
            return losses.mean()
        predicted = logits.detach().argmax(dim=-1) / (BINS - 1)
        weights = (predicted - targets).abs().clamp(max=MAX_ERROR) * (1 - giou(predicted, targets))[:, None]
        if weighting == "per_sample":
            return (losses * weights).mean()
        return (losses.mean(dim=0) * weights.mean(dim=0)).mean()

    def predict(
        self,
        model: Any,
        video: Tensor | None = None,
        *,
        text_ids: Tensor,
        text_mask: Tensor,
        image_embeds: Tensor | None = None,
    ) -> Boxes:
        """Boxes by four greedy steps.

        Args:
            model: with the modules of this task.
            video: `(B, 3, 1, H, W)`, or image_embeds `(B, S, D)` from `encode_image`.
            text_ids, text_mask: `(B, tokens)`.
        """
        inputs = {"video": video, "image_embeds": image_embeds, "text_ids": text_ids, "text_mask": text_mask}
        memory = _remember(model, inputs)
        batch, device = text_ids.shape[0], text_ids.device
        cache = model.decoder.new_cache(batch, 1, 4, device)
        token = torch.full((batch, 1), START, device=device)
        logits = []
        for step in range(4):
            logits.append(_places(model.decoder.step(token, step, cache, memory)[:, 0]))
            token = logits[-1].argmax(dim=-1, keepdim=True) + FIRST_BIN
        found = torch.stack(logits, dim=1)
        ids = found.argmax(dim=-1) + FIRST_BIN
        scores = found.float().softmax(dim=-1).amax(dim=-1).prod(dim=1)
        return Boxes((ids - FIRST_BIN) / (BINS - 1), ids, found, scores)

    def respond(self, model: Any, tokenizer: Tokenizer) -> Respond:
        """Boxes, clipped to the image."""

        def respond(image_embeds: Tensor, texts: Sequence[str | None]) -> list[Texts]:
            require(all(text is not None for text in texts), "this task needs a phrase for each image")
            ids, mask = model.config.wording.phrases(tokenizer, [str(text) for text in texts])
            ids, mask = ids.to(image_embeds.device), mask.to(image_embeds.device)
            found = model.predict(self, image_embeds=image_embeds, text_ids=ids, text_mask=mask)
            left_top, right_bottom = corners(found.boxes).clamp(0, 1).chunk(2, dim=1)
            boxes = torch.cat([(left_top + right_bottom) / 2, right_bottom - left_top], dim=1).tolist()
            scores = found.scores.tolist()
            return [
                [BoxAlternative(" ".join(f"{value:.4f}" for value in box), score, tuple(box))]
                if score == score
                else not_finite(next(model.parameters()).dtype)
                for box, score in zip(boxes, scores, strict=True)
            ]

        return respond

    def preparation(self, config: Any) -> Preparation:
        return config.grounding_preparation

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        ids, mask = config.wording.phrases(tokenizer, [item.text or "" for item in items])
        return {"text_ids": ids, "text_mask": mask, "target_boxes": torch.tensor([item.box for item in items])}

    def targets(self, batch: Mapping[str, Tensor], config: Any) -> int:
        return len(batch["target_boxes"])

    def text_of(self, item: Item, config: Any) -> str | None:
        return item.text

    def references(self, item: Item) -> Mapping[str, float]:
        require(item.box is not None, f"the item {item.id} has no box")
        return {" ".join(f"{value:.4f}" for value in item.box or ()): 1.0}

    def check_text(self, model: Any, tokenizer: Tokenizer, text: str) -> None:
        require_text(text, "the phrase")
        require(len(text) <= MAX_PHRASE_LENGTH, f"the phrase is longer than {MAX_PHRASE_LENGTH:,} characters")
        require_positions(model, "a phrase, with its padding,", model.config.wording.phrases(tokenizer, [text])[0])
        size = model.config.text.vocab_size
        require(
            size >= FIRST_BIN + BINS,
            f"the vocabulary has {size} tokens, and the places of boxes are the ids up to {FIRST_BIN + BINS - 1}",
        )


def corners(boxes: Tensor) -> Tensor:
    """(center x, center y, width, height) `(..., 4)` to (left, top, right, bottom)."""
    center, size = boxes.chunk(2, dim=-1)
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def iou(one: Tensor, other: Tensor, eps: float = 1e-16) -> Tensor:
    """The IoU of boxes `(B, 4)`, given by corners, pair by pair."""
    shared, union = _areas(one, other)
    return shared / (union + eps)


def giou(one: Tensor, other: Tensor, eps: float = 1e-5) -> Tensor:
    """The generalised IoU of boxes `(B, 4)`, given by center and size, pair by pair."""
    one, other = corners(one), corners(other)
    shared, union = _areas(one, other)
    hull = (torch.maximum(one[:, 2:], other[:, 2:]) - torch.minimum(one[:, :2], other[:, :2])).clamp(min=0).prod(dim=1)
    return shared / (union + eps) - (hull - union) / (hull + eps)


def _areas(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of the intersection and the union of boxes `(B, 4)`, given by corners."""
    low, high = torch.maximum(one[:, :2], other[:, :2]), torch.minimum(one[:, 2:], other[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    first, second = ((box[:, 2:] - box[:, :2]).prod(dim=1) for box in (one, other))
    return shared, first + second - shared


def _places(logits: Tensor) -> Tensor:
    """The logits of the places, of logits `(..., vocabulary)`.

    The official code adds -1e4 to all others, which leaves them a probability of zero in float32.
    """
    return logits[..., FIRST_BIN : FIRST_BIN + BINS]


def _remember(model: Any, batch: Mapping[str, Any]) -> Any:
    """The decoder's memory of [fusion image; fusion text]."""
    visual = model.embed(batch.get("video"), batch.get("image_embeds"))
    mask = batch["text_mask"]
    fused = model.fuse(model.encode_text(batch["text_ids"], mask), mask, visual)
    return model.decoder.remember(fused.memory, fused.memory_mask)
