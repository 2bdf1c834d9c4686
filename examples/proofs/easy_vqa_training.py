"""Training with the pictures and questions of easy-VQA.

A question for yes or no names a color or a shape. From the answers alone, models learned only that most pictures do not
have it. So a question that is not negated is also a text that goes with all pictures that have what it names.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from examples.proofs.easy_vqa import COLORS, SHAPES, asked, looks_of, pictures
from examples.proofs.several_questions import SeveralQuestions
from mplug2_fast.datasets import Item
from mplug2_fast.tasks import Classification
from mplug2_fast.training import Sample

QUESTIONS = 8
"""Questions about a picture in one step."""
SHIFT = 4
"""Pixels, at most."""

ANSWERS = SeveralQuestions()
PICTURES = Classification([f"{color} {shape}" for color in COLORS for shape in SHAPES], name="pictures")


class Colors:
    """Pictures, shifted and perhaps mirrored, with some of their questions, and a question that names their color.

    Pictures whose color and shape do not follow from the answers are left out. They are one in ten. Negated questions
    whose answer is no are the rarest. They are `rare` times as frequent here.
    """

    place, names = 0, COLORS
    rare = 3.0

    def __init__(self, config: Any) -> None:
        colors, shapes = looks_of(COLORS), looks_of(SHAPES)
        self._looks = {number: (colors[number], shapes[number]) for number in colors.keys() & shapes.keys()}
        self._numbers = sorted(self._looks)
        self._asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
        naming = defaultdict(set)
        for question, answer, number in asked("train"):
            self._asked[number].append((question, answer))
            words = question.rstrip("?").split()
            if answer in ("yes", "no") and not {"no", "not"} & {*words}:
                for name in {*words} & {*self.names}:
                    naming[name].add(question)
        self._naming = {name: sorted(found) for name, found in naming.items()}

    def __len__(self) -> int:
        return len(self._numbers)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        number = self._numbers[index]
        looks, about = self._looks[number], self._asked[number]
        chosen = self.choose(about, rng)
        name = looks[self.place]
        item = Item(
            id=name,  # texts with equal ids go with the same pictures
            caption=(str(rng.choice(self._naming[name])),),
            label=" ".join(looks),
            extra={"asked": [about[i] for i in chosen]},
        )
        return Sample(item, moved(pictures("train")[number], rng))

    def choose(self, asked: list[tuple[str, str]], rng: np.random.Generator) -> np.ndarray:
        """Numbers of some of the questions."""
        rare = [answer == "no" and bool({"no", "not"} & {*question.split()}) for question, answer in asked]
        weights = np.where(rare, self.rare, 1.0)
        return rng.choice(len(asked), QUESTIONS, p=weights / weights.sum())


class AsAsked(Colors):
    """The same with each question as often as it is asked."""

    rare = 1.0


class Shapes(Colors):
    """The same with a question that names the shape."""

    place, names = 1, SHAPES


def moved(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture `(1, 64, 64, 3)`, shifted and perhaps mirrored. Pixels from outside are as those of the edge."""
    _, height, width, _ = picture.shape
    y, x = rng.integers(0, 2 * SHIFT + 1, 2)
    wide = np.pad(picture, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    return wide[:, y : y + height, x : x + width][:, :, :: rng.choice((-1, 1))].copy()
