"""Right or wrong texts: exact match, accuracy, and the official accuracy of VQA."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mplug2_fast.evaluation.metrics.base import References, Scores, mean, percent

ANNOTATORS = 10
"""Annotators of each question of VQA."""


def exact_match(predictions: Sequence[str], references: Sequence[References]) -> Scores:
    """Whether a text equals any reference, apart from case and spaces."""
    return _share(
        "exact_match",
        [plain(text) in map(plain, right) for text, right in zip(predictions, references, strict=True)],
    )


def accuracy(predictions: Sequence[Sequence[str]], references: Sequence[References]) -> Scores:
    """Whether the first text, and whether one of the first five, is right, apart from case and spaces.

    The right answer is the reference of the greatest weight, or each of them if several have it. `accuracy@5` is left
    out if no item has more than one text to choose from.
    """
    found: dict[str, list[float]] = {}
    counts = (1, 5) if any(len(ranking) > 1 for ranking in predictions) else (1,)
    right = [_heaviest(weights) for weights in references]
    for count in counts:
        name = "accuracy" if count == 1 else f"accuracy@{count}"
        hits = [
            any(plain(text) in allowed for text in ranking[:count])
            for ranking, allowed in zip(predictions, right, strict=True)
        ]
        found[name] = percent(hits)
    return Scores({name: mean(values) for name, values in found.items()}, found)


def vqa_accuracy(predictions: Sequence[str], references: Sequence[References]) -> Scores:
    """The official accuracy of VQA: min(1, n / 3), averaged over the sets of nine of the ten annotators.

    n counts the annotators whose answer equals the text. A reference's weight is the share of annotators that gave it.
    Answers are normalised as in the official code, which does not normalise if all annotators agree.
    """
    return _share(
        "vqa_accuracy", [_vqa_score(text, right) for text, right in zip(predictions, references, strict=True)]
    )


def plain(text: str) -> str:
    """In lower case, with single spaces."""
    return " ".join(text.lower().split())


def normalise_vqa(text: str) -> str:
    """An answer, normalised like the official evaluation of VQA."""
    stripped = plain = _stripped(text)
    number_with_comma = re.search(r"\d,\d", stripped) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in stripped or f" {mark}" in stripped
        plain = plain.replace(mark, "" if beside_space or number_with_comma else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = [_NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _vqa_score(text: str, references: References) -> float:
    form = normalise_vqa if len(references) > 1 else _stripped
    said = form(text)
    agreeing = sum(weight for answer, weight in references.items() if form(answer) == said)
    count = round(ANNOTATORS * agreeing, 6)  # 0.1 is not exactly a tenth
    without_one_of_them = min(1.0, max(count - 1, 0) / 3)
    without_another = min(1.0, count / 3)
    return (count * without_one_of_them + (ANNOTATORS - count) * without_another) / ANNOTATORS


def _stripped(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _share(name: str, right: Sequence[float]) -> Scores:
    values = percent(right)
    return Scores({name: mean(values)}, {name: values})


def _heaviest(weights: References) -> set[str]:
    most = max(weights.values(), default=0.0)
    return {plain(text) for text, weight in weights.items() if weight == most}


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_an_apostrophe(word: str) -> list[str]:
    places = [place for place, character in enumerate(word) if character == "'"]
    return [word[:place] + word[place + 1 :] for place in places]


_CONTRACTIONS = {missing: word for word in _CONTRACTED.split() for missing in _without_an_apostrophe(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # as the official table has it
