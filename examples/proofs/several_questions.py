"""Training with several questions about each picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mplug2_fast.datasets import Item
from mplug2_fast.tasks import QuestionAnswering
from mplug2_fast.text import Tokenizer


class SeveralQuestions(QuestionAnswering):
    """Answers to as many questions about each picture, which is encoded once. They are in the field extra."""

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        asked = [Item(id="", question=q, answers={a: 1.0}) for item in items for q, a in item.extra["asked"]]
        return super().batch(asked, tokenizer, config)

    def remember(
        self,
        model: Any,
        video: Tensor | None,
        question_ids: Tensor,
        question_mask: Tensor,
        image_embeds: Tensor | None = None,
    ) -> Any:
        visual = model.embed(video, image_embeds)
        text = model.encode_text(question_ids, question_mask)
        text, mask = (each.unflatten(0, (len(visual), -1)) for each in (text, question_mask))
        fused = model.fuse(text, mask, visual)
        return model.decoder.remember(fused.memory.flatten(0, 1), fused.memory_mask.flatten(0, 1))
