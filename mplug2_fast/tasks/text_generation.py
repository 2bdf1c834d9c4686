"""Texts from texts: generation, and prefix language modelling with or without an image or a video.

Source: mPLUG (arXiv 2205.12005), section 3.3, for prefixes. That a caption is cut at a random place is inferred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mplug2_fast.tasks.base import require_positions, require_text, require_text_or_caption
from mplug2_fast.tasks.generative import IGNORED, shifted_labels, token_losses
from mplug2_fast.tasks.question_answering import QuestionAnswering

if TYPE_CHECKING:
    from mplug2_fast.datasets import Item
    from mplug2_fast.text import Tokenizer


class TextGeneration(QuestionAnswering):
    """A text for a text, such as a summary, by beam search. Batches are those of `QuestionAnswering`, without video."""

    name = "text_generation"
    modules = frozenset({"text", "decoder"})
    lengths = (1, 20)
    fields = ("text", "answers")
    metrics = ("exact_match", "rouge_l", "bleu")

    def remember(
        self,
        model: Any,
        video: Tensor | None,
        question_ids: Tensor,
        question_mask: Tensor,
        image_embeds: Tensor | None = None,
    ) -> Any:
        return model.decoder.remember(model.encode_text(question_ids, question_mask), question_mask)

    def encoded(self, model: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return tokenizer.encode(texts, end=False)

    def training_texts(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> tuple[Tensor, Tensor]:
        return tokenizer.encode([item.text or "" for item in items], config.text.max_position_embeddings, end=False)

    def text_of(self, item: Item, config: Any) -> str | None:
        return item.text

    def check_text(self, model: Any, tokenizer: Tokenizer, text: str) -> None:
        require_text(text)
        require_positions(model, "the text", self.encoded(model, tokenizer, [text])[0])


class PrefixModelling(QuestionAnswering):
    """The rest of a text from its beginning and an image or a video. Each call of the loss cuts the texts again."""

    name = "prefix_lm"
    fields = ("caption",)
    soft_targets = False

    def loss(self, model: Any, batch: Mapping[str, Any], *, places: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The mean cross-entropy of the tokens after the cuts.

        Args:
            model: with the modules of this task.
            batch: `text_ids`, `text_mask` `(B, tokens)`, from [CLS] to [SEP]; `video` `(B, 3, T, H, W)` or
                `image_embeds` `(B, S, D)`, where the task has them.
            places: `(B,)`, the first token of each rest; None draws them.
        """
        prefix, prefix_mask, rest, rest_mask = cut(batch["text_ids"], batch["text_mask"], places)
        parts = {"question_ids": prefix, "question_mask": prefix_mask, "answer_ids": rest, "answer_mask": rest_mask}
        ones = torch.ones(len(rest), dtype=torch.int64, device=rest.device)
        labels = shifted_labels(rest, model.pad_token_id)
        losses = token_losses(self.logits(model, {**batch, **parts, "answers_per_question": ones}), labels)
        return losses.sum() / (labels != IGNORED).sum().clamp(min=1)

    def samples(self, item: Item) -> list[Item]:
        return [replace(item, caption=(caption,)) for caption in item.caption]

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        texts = [self._whole(item) for item in items]
        ids, mask = tokenizer.encode(texts, config.text.max_position_embeddings, end=True)
        return {"text_ids": ids, "text_mask": mask}

    def targets(self, batch: Mapping[str, Tensor], config: Any) -> int:
        return len(batch["text_ids"])

    def text_of(self, item: Item, config: Any) -> str | None:
        return item.text

    def _whole(self, item: Item) -> str:
        return item.caption[0]


class TextPrefixModelling(PrefixModelling):
    """Continues a text, given its beginning alone."""

    name = "text_prefix_lm"
    modules = TextGeneration.modules
    fields = ()
    remember = TextGeneration.remember
    encoded = TextGeneration.encoded
    check_text = TextGeneration.check_text

    def require_fields(self, item: Item) -> None:
        require_text_or_caption(item, self.name)

    def samples(self, item: Item) -> list[Item]:
        return [item] if item.text else super().samples(item)

    def _whole(self, item: Item) -> str:
        return item.text or item.caption[0]


def cut(ids: Tensor, mask: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prefixes and rests of texts `(B, tokens)`, each with its mask. Both begin with [CLS], and rests end as the texts.

    Args:
        places: `(B,)`, the first token of each rest, from 1 on; None draws them.
    """
    lengths = mask.sum(dim=1)
    if places is None:
        places = 1 + (torch.rand(len(ids), device=ids.device) * (lengths - 2).clamp(min=1)).long()
    index = torch.arange(ids.shape[1], device=ids.device)
    prefix_mask = (index < places[:, None]).to(mask.dtype)
    source = index + places[:, None] - 1
    rest_mask = (source < lengths[:, None]).to(mask.dtype)
    rest = ids.gather(1, source.clamp(max=ids.shape[1] - 1)) * rest_mask
    rest[:, 0] = ids[:, 0]
    return ids * prefix_mask, prefix_mask, rest, rest_mask
