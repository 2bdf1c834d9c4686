"""How mPLUG's texts become token ids. Source: the datasets of the official code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mplug2_fast.errors import DataError, printable
from mplug2_fast.models.wording import Ids, Wording

if TYPE_CHECKING:
    from mplug2_fast.datasets import Item
    from mplug2_fast.text import Tokenizer

MAX_OCR_WORDS = 30
MAX_QUESTION_TOKENS = 80
"""Of a question in training; the test code truncates nothing."""
MAX_CAPTION_TOKENS = 25

_OPENINGS = ("a video of ", "a video clip of ", "a video showing ", "a video tutorial on ")


class MPlugWording(Wording):
    """Questions and captions are not cleaned: case and punctuation go to the tokenizer."""

    max_question_words = None

    def question_of(self, item: Item) -> str:
        """The question, then [SEP] and the words read in the image, then [SEP] and the labels of objects.

        The fields `ocr` ([[place, word], ...]) and `object_label` ("a&&b") of the item are optional.

        Raises:
            DataError: `ocr` has another form.
        """
        from mplug2_fast.text import clean_question

        text = item.question or ""
        words = _ocr_words(item)
        if words:
            text += f" [SEP] {clean_question(' '.join(words), MAX_OCR_WORDS)}"
        if "object_label" in item.extra:
            text += f" [SEP] {str(item.extra['object_label']).replace('&&', ' ')}"
        return text

    def clean_question(self, text: str) -> str:
        return text

    def training_questions(self, tokenizer: Tokenizer, texts: Sequence[str], longest: int) -> Ids:
        return tokenizer.encode(texts, min(longest, MAX_QUESTION_TOKENS), end=False)

    def captions(self, tokenizer: Tokenizer, texts: Sequence[str], prompt: str, longest: int) -> Ids:
        """Lower-case captions, ending with [SEP], of at most 25 tokens. A longer one loses its [SEP]."""
        return tokenizer.encode([prompt + text.lower() for text in texts], min(longest, MAX_CAPTION_TOKENS), end=True)

    def prefix(self, tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
        """[CLS] and the prompt without its last token, which the official code drops as if it were a [SEP]."""
        ids = tokenizer.encode([prompt], end=False)[0][0].tolist()
        return tuple(ids if len(ids) == 1 else ids[:-1])

    def caption(self, tokenizer: Tokenizer, ids: Iterable[int], prompt: str) -> str:
        text = tokenizer.decode(ids)
        return video_caption(text) if prompt else text


def _ocr_words(item: Item) -> list[str]:
    ocr: Any = item.extra.get("ocr") or []
    if not isinstance(ocr, list) or not all(isinstance(each, list | tuple) and len(each) == 2 for each in ocr):
        what = printable(repr(ocr), 80)
        raise DataError(f"the item {printable(item.id)}: ocr must be a list of [place, word], got {what}")
    return [str(word) for _, word in ocr]


def video_caption(text: str) -> str:
    """A caption of a video without its opening words, as the official evaluation on VATEX scores it."""
    text = f"{text} .".rpartition("a picture of ")[2]
    for opening in _OPENINGS:
        if opening in text:
            return text.rpartition(opening)[2]
    return text
