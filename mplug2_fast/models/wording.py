"""How texts become token ids, and token ids texts: one object per family. This is mPLUG-2's, and the base of others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from mplug2_fast.datasets import Item
    from mplug2_fast.text import Tokenizer

Ids = tuple[Tensor, Tensor]
"""Token ids and mask, both `(texts, tokens)`, int64."""

PHRASE_TOKENS = 20
"""Tokens of a phrase for grounding, [CLS], [SEP] and padding included."""


class Wording:
    """mPLUG-2's wording. The sources are the official datasets.

    Attributes:
        max_question_words: what the model reads of a question; None for all of it.
    """

    max_question_words: ClassVar[int | None] = 50

    def question_of(self, item: Item) -> str:
        """An item's question in the form that the model reads."""
        return item.question or ""

    def clean_question(self, text: str) -> str:
        """A question without the words that the model does not read."""
        from mplug2_fast.text import clean_question

        return clean_question(text)

    def questions(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
        """Questions: cleaned, not truncated, without [SEP]."""
        return tokenizer.encode([self.clean_question(text) for text in texts], end=False)

    def training_questions(self, tokenizer: Tokenizer, texts: Sequence[str], longest: int) -> Ids:
        """Questions as training reads them, of at most `longest` tokens."""
        ids, mask = self.questions(tokenizer, texts)
        return ids[:, :longest], mask[:, :longest]

    def answers(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
        """Answers: unchanged, with [SEP]."""
        return tokenizer.encode_answers(texts)

    def captions(self, tokenizer: Tokenizer, texts: Sequence[str], prompt: str, longest: int) -> Ids:
        """Captions for training, of at most `longest` tokens."""
        return tokenizer.encode_captions(texts, prompt, longest)

    def prefix(self, tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
        """The ids that a caption starts from. mPLUG-2 starts from [CLS] and learns the prompt."""
        return tuple(tokenizer.encode([""], end=False)[0][0].tolist())

    def caption(self, tokenizer: Tokenizer, ids: Iterable[int], prompt: str) -> str:
        """The caption of these ids."""
        return tokenizer.decode_caption(ids, prompt)

    def descriptions(self, tokenizer: Tokenizer, texts: Sequence[str], *, video: bool, training: bool) -> Ids:
        """Texts that images or videos are compared with."""
        from mplug2_fast.text import clean_caption

        words, tokens = (40, 35) if video else (30, 30)
        cleaned = [clean_caption(text, words) for text in texts]
        return tokenizer.encode(cleaned, None if training else tokens, end=False)

    def phrases(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
        """Phrases that name a part of an image: lower case, [SEP] at the end, padded to `PHRASE_TOKENS`."""
        return tokenizer.encode_phrases([text.lower() for text in texts], PHRASE_TOKENS)
