"""Self-critical sequence training (arXiv 1612.00563), as in mPLUG: the samples are beams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug2_fast.datasets import Item
from mplug2_fast.tasks.generative import BEFORE_LAST


class CiderReward:
    """CIDEr-D of generated captions, with document frequencies of all references of the training data.

    Args:
        references: of each item. tokenize: texts to texts of words with spaces between. decode: token ids to a text.
    """

    def __init__(self, references: Sequence[Sequence[str]], tokenize: Any, decode: Any) -> None:
        from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs

        self._decode = decode
        self._cook = lambda texts: cook_refs(tokenize(texts))
        self._scorer = CiderScorer()
        self._corpus = [self._cook(texts) for texts in references]
        self._scorer.crefs = self._corpus
        self._scorer.compute_doc_freq()

    def __call__(self, sequences: Tensor, items: Sequence[Item]) -> Tensor:
        """Sequences `(B, beams, tokens)`, padded with -1, to rewards `(B, beams)`."""
        rewards = []
        for row, item in zip(sequences.tolist(), items, strict=True):
            # The scorer takes the number of documents from the length of this list, and scores those that have a test.
            self._scorer.crefs = [self._cook(item.caption), *self._corpus[1:]]
            for ids in row:
                self._scorer.ctest = self._cook([self._decode(ids)])
                rewards += self._scorer.compute_cider()
        return torch.tensor(rewards, dtype=torch.float32).view(sequences.shape[:2])


def self_critical_loss(model: Any, batch: Mapping[str, Tensor], items: Sequence[Item], reward: Any) -> Tensor:
    """mean of -(score / length) · (reward - mean reward of the sample's beams).

    The score is the log-probability over the length penalty of the beam search; the length counts [CLS] and [SEP].

    Args:
        model: with the task captioning. batch: `video` or `image_embeds`. items: with all captions.
        reward: from sequences `(B, beams, tokens)` and items to `(B, beams)`.
    """
    given = {name: batch[name] for name in ("video", "image_embeds") if batch.get(name) is not None}
    detached = {name: value.detach() for name, value in given.items()}
    beams = model.config.generation.num_beams
    sequences = model.predict("captioning", **detached, num_return=beams).sequences
    memory = model.decoder.remember(model.embed(given.get("video"), given.get("image_embeds")))
    return weighted_loss(model, memory, sequences, reward(sequences, items).to(sequences.device))


def weighted_loss(model: Any, memory: Any, sequences: Tensor, rewards: Tensor) -> Tensor:
    """The loss for given hypotheses `(B, beams, tokens)`, padded with -1, and their rewards `(B, beams)`."""
    mask = sequences >= 0
    ids = sequences.clamp(min=0)
    logits = model.decoder(ids, mask.to(ids.dtype), memory, positions=BEFORE_LAST).float()
    nll = F.cross_entropy(logits.flatten(0, 2), ids[..., 1:].flatten(), reduction="none").view(ids[..., 1:].shape)
    log_p = -(nll * mask[..., 1:]).sum(dim=-1)
    length = mask.sum(dim=-1)
    penalty = ((5 + length - 1) / 6) ** 0.6
    advantage = rewards - rewards.mean(dim=-1, keepdim=True)
    return -(log_p / penalty / length * advantage).mean()
