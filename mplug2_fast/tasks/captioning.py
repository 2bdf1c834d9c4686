"""Captioning (mPLUG-2, section 3.3; mPLUG, section 4.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mplug2_fast.outputs import GenerationOutput
from mplug2_fast.tasks.base import Respond, Task, Texts
from mplug2_fast.tasks.generative import (
    BEFORE_LAST,
    IGNORED,
    search_options,
    shifted_labels,
    text_options,
    texts_of,
    token_losses,
)

if TYPE_CHECKING:
    from mplug2_fast.datasets import Item
    from mplug2_fast.text import Tokenizer


class Captioning(Task):
    """A caption for a video or an image, by beam search."""

    name = "captioning"
    modules = frozenset({"vision", "decoder"})
    lengths = (4, 20)
    options = ("num_beams", "num_return", "min_length", "max_length")
    fields = ("caption",)
    metrics = ("cider", "bleu", "rouge_l", "meteor", "spice", "exact_match")
    soft_targets = True

    def loss(self, model: Any, batch: Mapping[str, Any], *, soft: Tensor | None = None, alpha: float = 0.0) -> Tensor:
        """The mean cross-entropy over the targets. All tokens of the prompt but the last are ignored.

        Args:
            model: with the modules of this task.
            batch: `video` `(B, 3, T, H, W)` or `image_embeds` `(B, S, D)` from `encode_video`; `caption_ids` and
                `caption_mask` `(B, tokens)`, from [CLS] on, mask 1 for tokens and 0 for padding.
            soft, alpha: logits of a teacher and their weight: see `token_losses`.
        """
        labels = shifted_labels(batch["caption_ids"], model.pad_token_id, model.config.generation.prompt_tokens)
        losses = token_losses(self.logits(model, batch), labels, soft, alpha)
        return losses.sum() / (labels != IGNORED).sum()

    def logits(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The logits that predict the next tokens `(B, tokens - 1, vocabulary)`."""
        memory = model.decoder.remember(model.embed(batch.get("video"), batch.get("image_embeds")))
        ids, mask = batch["caption_ids"], batch["caption_mask"]
        return model.decoder(ids[:, None], mask[:, None], memory, positions=BEFORE_LAST)[:, 0]

    def targets(self, batch: Mapping[str, Tensor], config: Any) -> int:
        return int(batch["caption_mask"][:, 1 + config.generation.prompt_tokens :].sum())

    def predict(
        self,
        model: Any,
        video: Tensor | None = None,
        image_embeds: Tensor | None = None,
        *,
        prefix: Sequence[int] | None = None,
        **options: int | None,
    ) -> GenerationOutput:
        """Captions by beam search.

        Args:
            model: with the modules of this task.
            video: `(B, 3, T, H, W)`, or image_embeds `(B, S, D)` from `encode_video`.
            prefix: ids that every caption starts with; None for [CLS] alone. Lengths do not count it.
            options: see `search_options`.
        """

        def remember(video: Tensor | None, image_embeds: Tensor | None) -> Any:
            return model.decoder.remember(model.embed(video, image_embeds))

        filled = search_options(self, model, **options)
        return model.search(self.name, remember, [video, image_embeds], prefix=prefix, **filled)

    def respond(self, model: Any, tokenizer: Tokenizer, **options: Any) -> Respond:
        filled = text_options(self, model, **options)
        prompt, wording = model.config.generation.prompt, model.config.wording
        prefix = wording.prefix(tokenizer, prompt)

        def respond(image_embeds: Tensor, texts: Sequence[str | None]) -> list[Texts]:
            found = model.predict(self, image_embeds=image_embeds, prefix=prefix, **filled)
            return texts_of(found, lambda ids: wording.caption(tokenizer, ids, prompt), model)

        return respond

    def samples(self, item: Item) -> list[Item]:
        return [replace(item, caption=(caption,)) for caption in item.caption]

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        captions = [item.caption[0] for item in items]
        longest, prompt = config.text.max_position_embeddings, config.generation.prompt
        ids, mask = config.wording.captions(tokenizer, captions, prompt, longest)
        return {"caption_ids": ids, "caption_mask": mask}

    def references(self, item: Item) -> Mapping[str, float]:
        return {caption: float(count) for caption, count in Counter(item.caption).items()}
