"""Retrieval between texts and images or videos: contrast of features, and matching of pairs.

Source: mPLUG (arXiv 2205.12005), sections 3.3 and 4.2; ALBEF (arXiv 2107.07651) for the queues.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mplug2_fast.errors import printable
from mplug2_fast.nn.contrast import Keys, contrast_loss, contrast_within
from mplug2_fast.nn.momentum import MomentumCopy
from mplug2_fast.tasks.base import (
    Alternative,
    Respond,
    Task,
    Texts,
    not_finite,
    require,
    require_options,
    require_positions,
    require_text,
    wide,
)
from mplug2_fast.tasks.features import SPACES
from mplug2_fast.tasks.gallery import Gallery
from mplug2_fast.tasks.matching import Scores, matched, rerank

if TYPE_CHECKING:
    from mplug2_fast.datasets import Item
    from mplug2_fast.text import Tokenizer

MAX_TEXT_LENGTH = 10_000
"""Characters."""

_NOT_COPIED = ("fusion", "decoder", "matching")


class Losses(NamedTuple):
    """The losses of a step, and the weights of its negatives.

    Attributes:
        contrast, matching: one number each.
        image_weights: `(B, B)`, how likely each image is drawn as the negative of each text (row).
        text_weights: `(B, B)`, how likely each text is drawn as the negative of each image (row).
    """

    contrast: Tensor
    matching: Tensor
    image_weights: Tensor
    text_weights: Tensor

    @property
    def total(self) -> Tensor:
        return self.contrast + self.matching


class MomentumContrast(nn.Module):
    """The training state of contrast with queues: a momentum copy, and the features of the latest batches.

    Args:
        model: the trained model.
        queue_size: number of features to keep; a multiple of the batch of all ranks.
        momentum: of the copy.

    Attributes:
        image_queue, text_queue: `(embed_dim, queue_size)`, columns of norm 1. idx_queue: `(1, queue_size)`, int64, -100
            at first. queue_ptr: `(1,)`, where the next batch goes.
    """

    image_queue: Tensor
    text_queue: Tensor
    idx_queue: Tensor
    queue_ptr: Tensor

    def __init__(self, model: Any, queue_size: int = 65536, momentum: float = 0.995) -> None:
        super().__init__()
        self.copy = MomentumCopy(model, without=_NOT_COPIED, momentum=momentum)
        width, like = model.config.contrast.embed_dim, model.contrast.temperature
        for name in ("image_queue", "text_queue"):
            start = torch.randn(width, queue_size, dtype=like.dtype, device=like.device)
            self.register_buffer(name, F.normalize(start, dim=0))
        self.register_buffer("idx_queue", torch.full((1, queue_size), -100, dtype=torch.int64, device=like.device))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64, device=like.device))

    def update(self, model: nn.Module) -> None:
        """Moves the copy towards the model. Called once before each step."""
        self.copy.update(model)

    @torch.no_grad()
    def features(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The copy's features of a batch's visual inputs and texts, each `(B, embed_dim)`."""
        twin = self.copy.model
        visual = twin.visual_features(twin.embed(batch["video"], None))
        return visual, twin.text_features(twin.encode_text(batch["text_ids"], batch["text_mask"]))

    def keys(self, visual: Tensor, text: Tensor, ids: Tensor) -> tuple[list[Keys], list[Keys]]:
        """The features to compare texts, and visual inputs, with: the copy's of the batch, and the queue."""
        pairs = (visual, self.image_queue), (text, self.text_queue)
        images, texts = ([Keys(each.T, ids), Keys(queue, self.idx_queue[0])] for each, queue in pairs)
        return images, texts

    @torch.no_grad()
    def enqueue(self, visual: Tensor, text: Tensor, ids: Tensor) -> None:
        """Puts the features and ids of all ranks in place of the oldest ones.

        Raises:
            ValueError: the size of the queues is not a multiple of the batch.
        """
        visual, text, ids = (gathered(each) for each in (visual, text, ids))
        count, size = visual.shape[0], self.idx_queue.shape[1]
        if size % count:
            raise ValueError(f"queue_size {size} is not a multiple of the batch of all ranks, {count}: change one")
        start = int(self.queue_ptr)
        places = slice(start, start + count)
        self.image_queue[:, places] = visual.T
        self.text_queue[:, places] = text.T
        self.idx_queue[0, places] = ids
        self.queue_ptr[0] = (start + count) % size


class Retrieval(Task):
    """Which text matches which image or video."""

    name = "retrieval"
    modules = frozenset({"vision", "text", "fusion", "contrast", "matching"})
    reads_text = True
    fields = ("caption",)
    metrics = ("retrieval",)
    evaluation = "gallery"

    def training_state(self, model: Any, queue_size: int, momentum: float) -> nn.Module | None:
        return MomentumContrast(model, queue_size, momentum) if queue_size else None

    def loss(self, model: Any, batch: Mapping[str, Any], **options: Any) -> Tensor:
        """Contrast and matching, added: see `losses`."""
        return self.losses(model, batch, **options).total

    def losses(
        self,
        model: Any,
        batch: Mapping[str, Any],
        *,
        state: MomentumContrast | None = None,
        alpha: float = 0.0,
        negatives: tuple[Tensor, Tensor] | None = None,
        sharpness: float = 1.0,
    ) -> Losses:
        """The losses of a batch of pairs.

        Args:
            model: with the modules of this task.
            batch: `video` `(B, 3, T, H, W)`, or `image_embeds` `(B, S, D)` without a state; `text_ids`, `text_mask`
                `(B, tokens)`; `ids` `(B,)`, int64, equal for pairs that match each other.
            state: queues, to which the batch is added. None compares within the batch.
            alpha: weight of the momentum copy's own similarities among the targets.
            negatives: (index of the negative image of each text, of the negative text of each image). None draws them
                by similarity. A row has no negatives if the batch has no other id.
            sharpness: how much similar pairs are preferred as negatives. 1: as in the official code. 0: all pairs are
                equally likely.
        """
        ids, mask = batch["ids"], batch["text_mask"]
        visual = model.embed(batch.get("video"), batch.get("image_embeds"))
        text = model.encode_text(batch["text_ids"], mask)
        f, g = model.visual_features(visual), model.text_features(text)
        temperature = model.contrast.temperature
        if state is None:
            similarities = f @ g.T / temperature
            logits = similarities, similarities.T
            contrast = contrast_within(wide(similarities), ids)
        else:
            f_m, g_m = state.features(batch)
            with torch.no_grad():
                logits = f @ g_m.T / temperature, g @ f_m.T / temperature
            images, texts = state.keys(f_m, g_m, ids)
            of_images = contrast_loss(f, ids, texts, temperature, teacher=f_m, alpha=alpha)
            of_texts = contrast_loss(g, ids, images, temperature, teacher=g_m, alpha=alpha)
            contrast = (of_images + of_texts) / 2
            state.enqueue(f_m, g_m, ids)
        text_weights, image_weights = (_weights(sharpness * each.detach(), ids) for each in logits)
        if negatives is None:
            negatives = _drawn(image_weights), _drawn(text_weights)
        matching = self._matching(model, visual, text, mask, negatives, ids)
        return Losses(contrast, matching, image_weights, text_weights)

    def _matching(
        self, model: Any, visual: Tensor, text: Tensor, mask: Tensor, negatives: tuple[Tensor, Tensor], ids: Tensor
    ) -> Tensor:
        """The cross-entropy of pairs (label 1) and of texts and images with their negatives (label 0)."""
        image, other = negatives
        # The two texts of an image share its keys and values.
        both = torch.stack([text, text[other.clamp(min=0)]], dim=1)
        both_mask = torch.stack([mask, mask[other.clamp(min=0)]], dim=1)
        right, wrong = matched(model, visual, both, both_mask).unbind(dim=1)
        crossed = matched(model, visual[image.clamp(min=0)], text[:, None], mask[:, None])[:, 0]
        labels = torch.cat([torch.ones_like(ids), -other.clamp(max=0), -image.clamp(max=0)])
        labels[len(ids) :] *= -100  # a row without negatives is ignored
        return F.cross_entropy(wide(torch.cat([right, wrong, crossed])), labels)

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        texts = [item.caption[0] for item in items]
        video = items[0].video is not None
        text_ids, text_mask = config.wording.descriptions(tokenizer, texts, video=video, training=True)
        longest = config.text.max_position_embeddings
        ids = torch.tensor([zlib.crc32((item.media[0] if item.media else item.id).encode()) for item in items])
        return {"text_ids": text_ids[:, :longest], "text_mask": text_mask[:, :longest], "ids": ids}

    def samples(self, item: Item) -> list[Item]:
        return [replace(item, caption=(caption,)) for caption in item.caption]

    def targets(self, batch: Mapping[str, Tensor], config: Any) -> int:
        return len(batch["ids"])

    def predict(
        self,
        model: Any,
        video: Tensor | None = None,
        *,
        text_ids: Tensor,
        text_mask: Tensor,
        image_embeds: Tensor | None = None,
        k: int = 0,
        add_similarity: bool | None = None,
    ) -> Scores:
        """Scores of all visual inputs with all texts.

        Args:
            model: with the modules of this task.
            video: `(N, 3, T, H, W)`, or image_embeds `(N, S, D)` from `encode_video`.
            text_ids, text_mask: `(M, tokens)`.
            k: candidates of each row, by similarity, that are scored by matching; the rest get -100. 0 scores by
                similarity alone.
            add_similarity: whether the score is the matching logit plus the similarity. None: for videos of several
                frames, as the official code does.

        Raises:
            ValueError: a negative k.
        """
        visual = model.embed(video, image_embeds)
        if not k:
            features = SPACES["contrast"].features(model, text_ids, text_mask)
            similarities = wide(model.visual_features(visual)) @ wide(features).T
            return Scores(similarities, similarities.T, similarities)
        text = model.encode_text(text_ids, text_mask)
        similarities = wide(model.visual_features(visual)) @ wide(model.text_features(text)).T
        if add_similarity is None:
            add_similarity = model.config.frames_of(visual.shape[1]) > 1
        return rerank(
            model, lambda row: visual[row : row + 1], text, text_mask, similarities, k, add_similarity=add_similarity
        )

    def respond(self, model: Any, tokenizer: Tokenizer) -> Respond:
        """How likely each text matches its file."""

        def respond(image_embeds: Tensor, texts: Sequence[str | None]) -> list[Texts]:
            require(all(text is not None for text in texts), "this task needs a text for each file")
            video = model.config.frames_of(image_embeds.shape[1]) > 1
            given = [str(text) for text in texts]
            ids, mask = model.config.wording.descriptions(tokenizer, given, video=video, training=False)
            ids, mask = ids.to(image_embeds.device), mask.to(image_embeds.device)
            text = model.encode_text(ids, mask)
            logits = matched(model, image_embeds, text[:, None], mask[:, None])[:, 0].float()
            found = logits.softmax(dim=-1)[:, 1].tolist()
            return [
                [Alternative(text, p)] if p == p else not_finite(next(model.parameters()).dtype)
                for text, p in zip(given, found, strict=True)
            ]

        return respond

    def gallery(self, model: Any, tokenizer: Tokenizer, files: int = 0, **options: Any) -> Gallery:
        require_options(self, options, ("rerank",))
        return Gallery(model, tokenizer, files, **options)

    def text_of(self, item: Item, config: Any) -> str | None:
        return item.caption[0] if item.caption else item.text

    def references(self, item: Item) -> Mapping[str, float]:
        return dict.fromkeys(item.caption, 1.0)

    def check_text(self, model: Any, tokenizer: Tokenizer, text: str) -> None:
        from mplug2_fast.text import clean_caption

        require_text(text)
        require(bool(clean_caption(text)), f"the text {printable(repr(text), 80)} is empty without its punctuation")
        require(len(text) <= MAX_TEXT_LENGTH, f"the text is longer than {MAX_TEXT_LENGTH:,} characters")
        ids, _ = model.config.wording.descriptions(tokenizer, [text], video=True, training=False)
        require_positions(model, "the text", ids)


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """The rows of all ranks."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor
    rows = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(rows, tensor.contiguous())
    return torch.cat(rows)


def _weights(logits: Tensor, ids: Tensor) -> Tensor:
    """How likely each column of the batch is drawn for each row: by similarity, never a column with the same id."""
    weights = logits[:, : len(ids)].float().softmax(dim=1)
    return weights.masked_fill(ids[:, None] == ids, 0.0)


def _drawn(weights: Tensor) -> Tensor:
    """Draws a column for each row; -1 where no column has a weight."""
    possible = weights.sum(dim=1) > 0
    drawn = torch.where(possible[:, None], weights, 1.0).multinomial(1)[:, 0]
    return torch.where(possible, drawn, -1)
