"""Masked language modelling, of texts alone and of texts beside an image or a video.

Source: BERT (arXiv 1810.04805), section 3.1; ALBEF (arXiv 2107.07651), section 3.2, for texts beside images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.tasks.base import Alternative, Respond, Task, Texts, not_finite, require, require_text_or_caption, wide
from mplug2_fast.tasks.generative import IGNORED

if TYPE_CHECKING:
    from mplug2_fast.datasets import Item
    from mplug2_fast.text import Tokenizer

RATE = 0.15
"""Share of the tokens that are predicted."""
MASKED, RANDOM = 0.8, 0.1
"""Shares of these tokens that become [MASK], or a random token. The rest stays."""
MASK = "[MASK]"


class MaskedWords(Task):
    """The words behind [MASK] in a text.

    Args:
        fused: whether the text comes with an image or a video. The head then sees the text after fusion.
    """

    reads_text = True
    options = ("num_return",)
    name: str  # type: ignore[misc]
    modules: frozenset[str]  # type: ignore[misc]

    def __init__(self, fused: bool = False) -> None:
        self.fused = fused
        self.name = "fused_mlm" if fused else "mlm"
        self.modules = frozenset({"vision", "text", "fusion", "fusion_mlm"} if fused else {"text", "text_mlm"})

    def loss(self, model: Any, batch: Mapping[str, Any], *, rate: float = RATE) -> Tensor:
        """The mean cross-entropy of the masked tokens. Each call draws them again.

        Args:
            model: with the modules of this task.
            batch: `text_ids`, `text_mask` `(B, tokens)`; `mask_token_id` `(B,)`, the id of [MASK]; with `fused` also
                `video` `(B, 3, T, H, W)` or `image_embeds` `(B, S, D)`. With `labels` `(B, tokens)`, -100 where
                nothing is predicted, the texts are taken as masked already.
            rate: share of the tokens that are predicted.
        """
        ids, labels = batch["text_ids"], batch.get("labels")
        if labels is None:
            words = model.config.text.vocab_size
            spared = (model.start_token_id, model.end_token_id, model.pad_token_id)
            ids, labels = masked(ids, batch["text_mask"], batch["mask_token_id"], words, spared, rate)
        hidden = self._hidden(model, {**batch, "text_ids": ids})
        places = labels != IGNORED
        logits = wide(self._logits(model, hidden[places]))
        return F.cross_entropy(logits, labels[places], reduction="sum") / places.sum().clamp(min=1)

    def predict(self, model: Any, video: Tensor | None = None, **inputs: Any) -> Tensor:
        """The logits of all tokens `(B, tokens, vocabulary)`. Inputs: see `loss`."""
        return self._logits(model, self._hidden(model, {"video": video, **inputs}))

    def _hidden(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        text = model.encode_text(batch["text_ids"], batch["text_mask"])
        if not self.fused:
            return text
        visual = model.embed(batch.get("video"), batch.get("image_embeds"))
        return model.fuse(text, batch["text_mask"], visual).text

    def _logits(self, model: Any, hidden: Tensor) -> Tensor:
        head = model.fusion_mlm if self.fused else model.text_mlm
        return head(hidden, model.text.embeddings.word.weight)

    def respond(self, model: Any, tokenizer: Tokenizer, num_return: int = 1) -> Respond:
        """The text with the likeliest words filled in. Alternatives differ in the first word."""
        require(num_return >= 1, f"num_return must be at least 1, got {num_return}")

        def respond(image_embeds: Tensor | None, texts: Sequence[str | None]) -> list[Texts]:
            require(all(text is not None for text in texts), f"this task needs a text with {MASK}")
            given, device = [str(text) for text in texts], next(model.parameters()).device
            ids, mask = tokenizer.encode(given, model.config.text.max_position_embeddings, end=True)
            inputs = {"text_ids": ids.to(device), "text_mask": mask.to(device)}
            if image_embeds is not None:
                inputs["image_embeds"] = image_embeds
            found = model.predict(self, **inputs)
            places = (ids == mask_id(tokenizer)).to(device)
            return [
                filled(text, logits[seen], tokenizer, num_return)
                for text, logits, seen in zip(given, found, places, strict=True)
            ]

        return respond

    def check_text(self, model: Any, tokenizer: Tokenizer, text: str) -> None:
        from mplug2_fast.text import is_text

        require(is_text(text), "the text has characters that are not UTF-8")
        longest = model.config.text.max_position_embeddings
        ids, _ = tokenizer.encode([text], longest, end=True)
        seen = int((ids == mask_id(tokenizer)).sum())
        require(seen > 0, f"the text has no {MASK} to fill")
        require(seen == text.count(MASK), f"the model reads {longest} tokens, and a {MASK} comes after them")

    def require_fields(self, item: Item) -> None:
        super().require_fields(item)
        require_text_or_caption(item, self.name)

    def samples(self, item: Item) -> list[Item]:
        return [item] if item.text else [replace(item, caption=(caption,)) for caption in item.caption]

    def batch(self, items: Sequence[Item], tokenizer: Tokenizer, config: Any) -> dict[str, Tensor]:
        texts = [item.text or item.caption[0] for item in items]
        ids, mask = tokenizer.encode(texts, config.text.max_position_embeddings, end=True)
        number = mask_id(tokenizer)
        return {"text_ids": ids, "text_mask": mask, "mask_token_id": torch.full((len(items),), number)}

    def targets(self, batch: Mapping[str, Tensor], config: Any) -> int:
        return len(batch["text_ids"])

    def text_of(self, item: Item, config: Any) -> str | None:
        return item.text


def masked(
    ids: Tensor, mask: Tensor, mask_token_id: Tensor, words: int, spared: Sequence[int], rate: float = RATE
) -> tuple[Tensor, Tensor]:
    """Ids `(B, tokens)` with some masked, and labels, -100 where nothing is predicted.

    Args:
        mask: 0 for padding, which is never masked. mask_token_id: `(B,)`. words: entries of the vocabulary.
        spared: ids that are never masked. rate: share of the other tokens that are predicted.
    """
    is_spared = torch.isin(ids, torch.tensor(spared, device=ids.device)) | (mask == 0)
    chosen = (torch.rand(ids.shape, device=ids.device) < rate) & ~is_spared
    way = torch.rand(ids.shape, device=ids.device)
    other = torch.randint(words, ids.shape, device=ids.device)
    changed = torch.where(way < MASKED, mask_token_id[:, None], torch.where(way < MASKED + RANDOM, other, ids))
    return torch.where(chosen, changed, ids), torch.where(chosen, ids, IGNORED)


def filled(text: str, logits: Tensor, tokenizer: Tokenizer, count: int) -> Texts:
    """The text with the likeliest words for each [MASK], and `count` choices of the first one.

    Args:
        logits: `(masks, vocabulary)`.
    """
    if not logits.isfinite().all():
        return not_finite(logits.dtype)
    probabilities = logits.float().softmax(dim=-1)
    likeliest, words = probabilities.max(dim=-1)
    first, choices = probabilities[0].topk(min(count, probabilities.shape[1]))
    rest = float(likeliest[1:].prod())
    parts = text.split(MASK)
    results = []
    for score, choice in zip(first.tolist(), choices.tolist(), strict=True):
        chosen = [tokenizer.decode([word]) for word in (choice, *words[1:].tolist())]
        whole = "".join(part + word for part, word in zip(parts, [*chosen, ""], strict=True))
        results.append(Alternative(whole, score * rest))
    return results


def mask_id(tokenizer: Tokenizer) -> int:
    """The id of [MASK]."""
    return int(tokenizer.encode([MASK], end=False)[0][0, 1])
