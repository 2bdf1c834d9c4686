"""Questions about pictures of one shape: 4,000 pictures with 38,575 questions, of the package easy-vqa."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from typing import Any

import numpy as np
from PIL import Image

from examples.proofs.digits import NEEDS
from examples.proofs.several_questions import SeveralQuestions
from mplug2_fast.datasets import Item
from mplug2_fast.tasks import Classification
from mplug2_fast.tasks.generative import IGNORED
from mplug2_fast.training import Sample

COLORS = ("black", "gray", "red", "green", "blue", "yellow", "teal", "brown")
SHAPES = ("circle", "rectangle", "triangle")

QUESTIONS = 8
"""Questions about a picture in one step."""
SHIFT = 4
"""Pixels, at most."""


class Pictures(Classification):
    """The color and shape of a picture. Pictures without a label do not count."""

    def label_of(self, item: Item) -> int:
        return IGNORED if item.label is None else super().label_of(item)


SEVERAL = SeveralQuestions()
PICTURES = Pictures([f"{color} {shape}" for color in COLORS for shape in SHAPES], name="pictures")


@functools.cache
def pictures(split: str) -> dict[int, np.ndarray]:
    """The pictures of "train" or "test" `(1, 64, 64, 3)`, uint8, by their numbers."""
    found = {}
    for number, path in getattr(_package(), f"get_{split}_image_paths")().items():
        with Image.open(path) as picture:
            found[number] = np.array(picture.convert("RGB"))[None]
    return found


def questions(split: str) -> list[Sample]:
    """All questions of "train" or "test", with their pictures and answers."""
    seen = pictures(split)
    return [Sample(Item(id="", question=q, answers={a: 1.0}), seen[number]) for q, a, number in _asked(split)]


class Questions:
    """The training pictures, each shifted and perhaps mirrored, with some of their questions and answers.

    Labels are the color and shape that follow from them. Those of one picture in ten do not.
    """

    def __init__(self, config: Any) -> None:
        self._asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, number in _asked("train"):
            self._asked[number].append((question, answer))
        self._numbers = sorted(self._asked)
        colors, shapes = looks_of(COLORS), looks_of(SHAPES)
        self._labels = {number: f"{colors[number]} {shapes[number]}" for number in colors.keys() & shapes.keys()}

    def __len__(self) -> int:
        return len(self._numbers)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        number = self._numbers[index]
        asked = self._asked[number]
        chosen = rng.choice(len(asked), QUESTIONS, replace=len(asked) < QUESTIONS)
        item = Item(id="", label=self._labels.get(number), extra={"asked": [asked[i] for i in chosen]})
        return Sample(item, moved(pictures("train")[number], rng))


def moved(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture `(1, 64, 64, 3)`, shifted and perhaps mirrored. Pixels from outside are as those of the edge."""
    _, height, width, _ = picture.shape
    y, x = rng.integers(0, 2 * SHIFT + 1, 2)
    wide = np.pad(picture, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    return wide[:, y : y + height, x : x + width][:, :, :: rng.choice((-1, 1))].copy()


def looks_of(names: tuple[str, ...], split: str = "train") -> dict[int, str]:
    """Number of a picture -> the name that its questions and answers imply, for example its color."""
    found: dict[int, str] = {}
    absent: dict[int, set[str]] = defaultdict(set)
    for question, answer, number in _asked(split):
        words = question.rstrip("?").split()
        named = next((name for name in names if name in words), None)
        if answer in names:
            found[number] = answer
        elif named is not None and (answer not in ("yes", "no") or (answer == "yes") != bool({"no", "not"} & {*words})):
            found[number] = named
        elif named is not None:
            absent[number].add(named)
    left = {number: [name for name in names if name not in some] for number, some in absent.items()}
    return {number: some[0] for number, some in left.items() if len(some) == 1} | found


def held_out(config: Any) -> list[Sample]:
    return questions("test")


def blind() -> dict[str, float]:
    """The accuracy of answering each question as it is most often answered in training, whatever the picture."""
    answers: dict[str | None, Counter[str]] = defaultdict(Counter)
    for item, _ in questions("train"):
        answers[item.question].update(item.answers)
    usual = {question: found.most_common(1)[0][0] for question, found in answers.items()}
    test = questions("test")
    return {"question_only": sum(usual.get(item.question) in item.answers for item, _ in test) / len(test)}


def _asked(split: str) -> list[tuple[str, str, int]]:
    """Question, answer and number of the picture."""
    return list(zip(*getattr(_package(), f"get_{split}_questions")(), strict=True))


def _package() -> Any:
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(NEEDS) from error
    return easy_vqa
